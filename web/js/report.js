/** The Engine Report's text, on the node itself. The node's output stays as the server has it. */

import { app } from "../../../scripts/app.js";
import { ComfyWidgets } from "../../../scripts/widgets.js";
import { said } from "./said.js";

const WIDGET = "text";

/** @param {any} node @returns {boolean} */
export function isReport(node) {
    return (node?.comfyClass ?? node?.type) === "SwitchyardReport";
}

/**
 * Give the node a field for the report, which comes with the node's output.
 *
 * @param {any} node
 */
export function addReport(node) {
    const options = ["STRING", { multiline: true }];
    const { widget } = ComfyWidgets.STRING(node, WIDGET, options, app);
    widget.options.read_only = true;
    const area = widget.inputEl ?? widget.element;
    if (area) area.readOnly = true;
    // What a run said belongs neither to the workflow's file nor to the next prompt.
    widget.serialize = false;
    widget.options.serialize = false;
    const onExecuted = node.onExecuted;
    node.onExecuted = function (/** @type {any} */ output, /** @type {any[]} */ ...rest) {
        onExecuted?.call(this, output, ...rest);
        widget.value = said(output?.text?.[0] ?? "");
    };
}
