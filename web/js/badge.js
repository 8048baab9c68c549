/**
 * The badge on a node: building, on the engine, or fell back.
 *
 * Nodes drawn on the canvas and nodes drawn by Vue read the same `node.badges`; they learn of a
 * change in different ways, and `redrawBadges` goes both.
 */

import { app } from "../../../scripts/app.js";
import { rootGraph } from "./graph.js";
import { setting, t } from "./i18n.js";
import { storedTab } from "./tab.js";

export const BADGE_SETTING = "Switchyard.Node.Badge";

/** Readable on light and dark palettes, with a contrast of 7 or more. */
const COLOURS = {
    build: { bgColor: "#3b3170", fgColor: "#efeaff" },
    engine: { bgColor: "#14532d", fgColor: "#e7fbee" },
    host: { bgColor: "#713f12", fgColor: "#fff3d6" },
    off: { bgColor: "#3f3f46", fgColor: "#f4f4f5" },
};

/** @typedef {import("./server.js").Status} Status */

/**
 * The last status of each node, oldest first. By name and not by the node itself: changing the
 * language or the tab makes all nodes anew.
 *
 * @type {Map<string, Status>}
 */
const statuses = new Map();

const MOST_STATUSES = 500;

/** @param {any} node @returns {string} */
function nameOf(node) {
    return `${node.graph?.id} ${node.id}`;
}

/**
 * Give a node its badge, empty until a status arrives.
 *
 * @param {any} node
 */
export function addBadge(node) {
    if (!Array.isArray(node.badges) || !window.LGraphBadge) return;
    /** @type {{text: string, badge: any}} */
    let last = { text: "", badge: new window.LGraphBadge({ text: "" }) };
    const getter = () => {
        // Vue nodes ask again only when something that they watch has changed: this has, then.
        void storedTab()?.revision;
        const status = statuses.get(nameOf(node));
        const text = status && setting(BADGE_SETTING) !== false ? label(status) : "";
        if (text !== last.text) {
            last = { text, badge: new window.LGraphBadge({ text, ...COLOURS[status?.state] }) };
        }
        return last.badge;
    };
    // The first badge is the front end's own, and it leaves that one out of Vue nodes. Extensions
    // that were registered later get their turn before a microtask does.
    if (node.badges.length) node.badges.push(getter);
    else queueMicrotask(() => node.badges.push(getter));
}

/**
 * @param {Status} status
 * @returns {string} short: the whole line stands on the node already
 */
function label({ state, text }) {
    if (!(state in COLOURS)) return "";
    // Numbers only: they read the same in every language.
    const details = [/\b\d+ %/, /\b\d+(\.\d+)?x(?= |$)/, /(\d+(\.\d+)?|inf) dB/]
        .map((pattern) => text?.match(pattern)?.[0].trim())
        .filter(Boolean);
    return [t(`badge.${state}`), ...details].join(" · ");
}

/**
 * Show what an event said about a node.
 *
 * @param {Status} status
 */
export function showStatus(status) {
    const node = findNode(status?.node_id);
    if (!node) return;
    const name = nameOf(node);
    statuses.delete(name);
    statuses.set(name, status);
    if (statuses.size > MOST_STATUSES) statuses.delete(statuses.keys().next().value);
    redrawBadges();
}

/** @returns {Status[]} those whose nodes are in the workflow at hand */
export function shownStatuses() {
    return [...statuses].flatMap(([name, status]) => {
        const node = findNode(status.node_id);
        return node && nameOf(node) === name ? [status] : [];
    });
}

/** Show all badges again: after a status, or once the language or the setting has changed. */
export function redrawBadges() {
    app.canvas?.setDirty?.(true, true);
    const tab = storedTab();
    if (tab) tab.revision += 1;
}

/**
 * The node of an id as the server knows it: inside subgraphs it is a path like "12:5".
 *
 * @param {string | number | null | undefined} path
 * @returns {any} null when this workflow has no such node
 */
export function findNode(path) {
    if (path === null || path === undefined) return null;
    let graph = rootGraph();
    let node = null;
    for (const part of String(path).split(":")) {
        // Older front ends keep numbers as numbers.
        node = graph?.getNodeById?.(Number.isNaN(Number(part)) ? part : Number(part)) ?? null;
        if (!node) return null;
        graph = node.subgraph;
    }
    return hasStatus(node) ? node : null;
}

/** @param {any} node @returns {boolean} whether the pack tells this node's status */
export function hasStatus(node) {
    return /^Switchyard(Accelerate|Load)/.test(node?.comfyClass ?? node?.type ?? "");
}
