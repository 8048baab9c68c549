/** "Compare once": the next picture also on the host's own path, and how far apart they are. */

import { app } from "../../../scripts/app.js";
import { NODE } from "./accelerate.js";
import { t } from "./i18n.js";
import { toast } from "./notify.js";

const WIDGET = "compare_once";

/** @param {any} node @returns {boolean} */
export function canCompare(node) {
    return node?.type === NODE && Boolean(node.widgets?.some((widget) => widget.name === WIDGET));
}

/**
 * Queue once with the node's `compare_once` on. The status of that run brings the PSNR.
 *
 * Only this prompt says true: the widget keeps its value, so neither undo nor the workflow inside
 * the picture remembers a switch that nobody left on.
 *
 * @param {any} node
 * @returns {Promise<void>}
 */
export async function compareOnce(node) {
    if (!canCompare(node)) return;
    if (node.mode === 2 || node.mode === 4) {
        toast("warn", t("compare.off"));
        return;
    }
    const widget = node.widgets.find((candidate) => candidate.name === WIDGET);
    const own = Object.getOwnPropertyDescriptor(widget, "serializeValue");
    const restore = () => {
        if (own) Object.defineProperty(widget, "serializeValue", own);
        else delete widget.serializeValue;
    };
    widget.serializeValue = () => {
        restore();
        return true;
    };
    try {
        const queued = await app.queuePrompt(0, 1);
        // False while another prompt is being put together: then this one's turn comes later.
        if (queued !== false) restore();
        toast("info", t("compare.queued"));
    } catch (error) {
        restore();
        throw error;
    }
}
