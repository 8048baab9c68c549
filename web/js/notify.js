/** Messages and questions, in the front end's own look. */

import { app } from "../../../scripts/app.js";

/**
 * @param {"success" | "info" | "warn" | "error"} severity
 * @param {string} detail
 */
export function toast(severity, detail) {
    app.extensionManager?.toast?.add({ severity, summary: "Switchyard", detail, life: 5000 });
}

/**
 * @param {string} title
 * @param {string} message
 * @param {string[]} [items] what it is about
 * @returns {Promise<boolean>}
 */
export async function confirmDelete(title, message, items) {
    const dialog = app.extensionManager?.dialog;
    if (!dialog?.confirm) return window.confirm([message, ...(items ?? [])].join("\n"));
    const answer = await dialog.confirm({ title, message, type: "delete", itemList: items });
    return answer === true;
}
