/** The workflow's graphs. */

import { app } from "../../../scripts/app.js";

/**
 * The outermost graph. Asked of the canvas, since the application complains on the console when it
 * is asked too early.
 *
 * @returns {any} undefined before there is one
 */
export function rootGraph() {
    const graph = app.canvas?.graph;
    return graph?.rootGraph ?? graph;
}

/** @param {any} graph @param {any} id @returns {any} */
export function getLink(graph, id) {
    return graph.getLink?.(id) ?? graph.links?.get?.(id) ?? graph.links?.[id];
}
