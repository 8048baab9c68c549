/**
 * What to do about a reason. The server says what happened; the advice depends on the mechanism,
 * which the reason's words name.
 */

import { t } from "./i18n.js";

/** First match wins. */
const ADVICE = /** @type {[RegExp, string][]} */ ([
    [/\b(vram|memory|budget)\b/i, "memory"],
    [/\b(hooks?)\b/i, "hooks"],
    [/\b(gguf|quanti[sz]ed|fp8|nvfp4)\b/i, "quantised"],
    [/\b(failed|cancelled)\b/i, "failed"],
    [/\b(being built|building|not built)\b/i, "building"],
    [/\b(size|width|height|latent|multiple of)\b/i, "size"],
    [/\b(structure|network|architecture|family)\b.*\b(not|un)/i, "unsupported"],
]);

/**
 * @param {import("./server.js").Reason} reason
 * @returns {string}
 */
export function advice({ text, node }) {
    const key = ADVICE.find(([pattern]) => pattern.test(text))?.[1];
    if (key) return t(`advice.${key}`);
    return node ? t("advice.node", { node }) : t("advice.other");
}
