/**
 * The line on a node, in the front end's language.
 *
 * The front end itself shows it, as the server's progress text, in English. So it is told the same
 * once more, translated; and again where the language has changed or the nodes were made anew.
 */

import { api } from "../../../scripts/api.js";
import { findNode, shownStatuses } from "./badge.js";
import { said } from "./said.js";
import { listen } from "./server.js";

/** @typedef {{nodeId: string, text: string, prompt_id?: string, translated?: boolean}} Line */

const EVENT = "progress_text";

/** Have the lines on the pack's nodes translated. */
export function translateLines() {
    listen(EVENT, (/** @type {Line} */ line) => {
        if (line.translated || said(line.text) === line.text || !findNode(line.nodeId)) return;
        // The front end's own listener may come after this one.
        queueMicrotask(() => show(line));
    });
}

/** Show all lines again. */
export function redrawLines() {
    for (const { node_id: nodeId, text } of shownStatuses()) show({ nodeId, text });
}

/** @param {Line} line in English */
function show(line) {
    const detail = { ...line, text: said(line.text), translated: true };
    api.dispatchEvent(new CustomEvent(EVENT, { detail }));
}
