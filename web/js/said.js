/**
 * The server's texts in the front end's language.
 *
 * The server does not know who reads its texts, and says all of them in English: lines on nodes,
 * reasons, reports, errors. `said` in a language's main.json has a text for each, under the English
 * one with `{name}` where something known at run time alone stands. That is translated in its turn:
 * in "host's path: {reason}" the reason, and in "{who} changes {part}" the part. A text that is not
 * there, as another program's error, stays as it is. English has no such table and needs none.
 */

import { translated } from "./i18n.js";

/** @typedef {{pattern: RegExp, names: string[], text: string}} Rule */

/** Places for numbers: anything may stand in the others. */
const NUMBERS = new Set(["count", "db", "ms", "percent", "ratio"]);

/** What the server puts several texts together with, the outermost first. */
const BETWEEN = ["\n", " · "];
const REASONS = "; ";

/** A reason's last part: its node, whose name may have brackets too. */
const NODE = /^(.*\S) \(([^()]*(?:\([^()]*\)[^()]*)*)\)$/s;

/** Between two of these stands no space; templates have one around names in Latin script. */
const HAN = /\p{Script=Han}/u;

/** @type {WeakMap<object, Rule[]>} */
const rulesByTable = new WeakMap();

/**
 * @param {string} text of the server
 * @returns {string}
 */
export function said(text) {
    const table = translated("said");
    if (!table || !text) return text;
    return inParts(text, BETWEEN, (part) => phrase(part, rulesOf(table)));
}

/**
 * @param {string} text
 * @param {string[]} separators
 * @param {(part: string) => string} translate
 * @returns {string}
 */
function inParts(text, [separator, ...rest], translate) {
    if (separator === undefined) return translate(text);
    const parts = text.split(separator);
    return parts.map((part) => inParts(part, rest, translate)).join(separator);
}

/**
 * @param {string} text without separators of lines
 * @param {Rule[]} rules
 * @returns {string}
 */
function phrase(text, rules) {
    const whole = rules.findIndex(({ pattern }) => pattern.test(text));
    const [, reason, node] = text.match(NODE) ?? [];
    if (reason !== undefined) {
        // Brackets may belong to a rule, and then it is a more specific one.
        const known = rules.findIndex(({ pattern }) => pattern.test(reason));
        if (known >= 0 && (whole < 0 || known <= whole)) {
            return `${fill(reason, rules[known], rules)} (${phrase(node, rules)})`;
        }
    }
    if (whole >= 0) return fill(text, rules[whole], rules);
    if (!text.includes(REASONS)) return text;
    return inParts(text, [REASONS], (part) => phrase(part, rules));
}

/**
 * @param {string} text that the rule is for
 * @param {Rule} rule
 * @param {Rule[]} rules for what stands in its places
 * @returns {string}
 */
function fill(text, { pattern, names, text: template }, rules) {
    const found = text.match(pattern) ?? [];
    const values = Object.fromEntries(names.map((name, index) => [name, found[index + 1]]));
    return template.replace(/( ?)\{(\w+)\}( ?)/g, (_, before, name, after) => {
        const value = phrase(values[name], rules);
        return (HAN.test(value[0]) ? "" : before) + value + (HAN.test(value.at(-1)) ? "" : after);
    });
}

/**
 * @param {Object<string, string>} table
 * @returns {Rule[]} the most specific first: without places, with numbers, then by the words before
 *     the first place, then by all words
 */
function rulesOf(table) {
    let rules = rulesByTable.get(table);
    if (!rules) {
        const place = /\{\w+\}/;
        const numbered = (/** @type {string} */ english) =>
            [...english.matchAll(/\{(\w+)\}/g)].some(([, name]) => NUMBERS.has(name));
        const before = (/** @type {string} */ english) => english.split(place)[0].length;
        const words = (/** @type {string} */ english) => english.split(place).join("").length;
        const order = Object.keys(table).sort(
            (one, other) =>
                Number(place.test(one)) - Number(place.test(other)) ||
                Number(numbered(other)) - Number(numbered(one)) ||
                before(other) - before(one) ||
                words(other) - words(one),
        );
        rules = order.map((english) => ruleOf(english, table[english]));
        rulesByTable.set(table, rules);
    }
    return rules;
}

/**
 * @param {string} english
 * @param {string} text
 * @returns {Rule}
 */
function ruleOf(english, text) {
    /** @type {string[]} */
    const names = [];
    // Of several reasons in a row none belongs to another's place.
    const source = english.split(/\{(\w+)\}/).map((piece, index) => {
        if (index % 2 === 0) return piece.replace(/[\\^$.*+?()[\]{}|]/g, "\\$&");
        names.push(piece);
        return NUMBERS.has(piece) ? "(\\d[\\d.]*)" : "((?:(?!; ).)*?)";
    });
    return { pattern: new RegExp(`^${source.join("")}$`, "s"), names, text };
}
