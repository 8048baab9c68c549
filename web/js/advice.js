/**
 * What to do about a reason. The server says what happened; the advice depends on the mechanism,
 * which the reason's words name.
 */

import { t } from "./i18n.js";
import { said } from "./said.js";

/** First match wins. */
const ADVICE = /** @type {[RegExp, string][]} */ ([
    [/\bcompared with\b/i, "compare"],
    [/(^|\s)--[a-z]/i, "option"],
    [/\b(vram|memory|budget|room)\b/i, "memory"],
    [/\bhooks?\b/i, "hooks"],
    [/\b(gguf|quanti[sz]ed|fp8|nvfp4)\b/i, "quantised"],
    [/\bcomputes in\b/i, "precision"],
    [/\b(could not be built|failed|cancelled)\b/i, "failed"],
    [/\b(supported|not known yet|in its own way|is not a)\b/i, "unsupported"],
]);

/**
 * @param {import("./server.js").Reason} reason
 * @returns {string}
 */
export function advice({ text, node }) {
    const key = ADVICE.find(([pattern]) => pattern.test(text))?.[1];
    if (key) return t(`advice.${key}`);
    return node ? t("advice.node", { node: said(node) }) : t("advice.other");
}
