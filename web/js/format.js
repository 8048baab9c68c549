/** Numbers for people: in the front end's language, with the units of the field. */

import { locale, t } from "./i18n.js";

/**
 * @param {number} value
 * @param {number} [digits] after the point
 * @returns {string}
 */
export function number(value, digits = 0) {
    return value.toLocaleString(locale(), {
        minimumFractionDigits: digits,
        maximumFractionDigits: digits,
    });
}

/**
 * @param {number} bytes
 * @returns {string} e.g. "393 MiB"
 */
export function size(bytes) {
    const units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let unit = 0;
    while (bytes >= 1024 && unit < units.length - 1) {
        bytes /= 1024;
        unit += 1;
    }
    return `${number(bytes, unit > 0 && bytes < 10 ? 1 : 0)} ${units[unit]}`;
}

/**
 * @param {number} seconds
 * @returns {string} its two largest units, e.g. "1 h 24 min"
 */
export function duration(seconds) {
    if (seconds < 10) return t("unit.s", { n: number(seconds, 1) });
    const whole = Math.round(seconds);
    const [hours, minutes, rest] = [
        Math.floor(whole / 3600),
        Math.floor(whole / 60) % 60,
        whole % 60,
    ];
    if (hours) return `${t("unit.h", { n: number(hours) })} ${t("unit.min", { n: minutes })}`;
    if (minutes) return `${t("unit.min", { n: minutes })} ${t("unit.s", { n: rest })}`;
    return t("unit.s", { n: rest });
}

/**
 * @param {number | null} epoch seconds since 1970
 * @returns {string} e.g. "3 days ago"
 */
export function ago(epoch) {
    if (!epoch) return t("engines.never");
    const seconds = epoch - Date.now() / 1000;
    const format = new Intl.RelativeTimeFormat(locale(), { numeric: "auto" });
    for (const [unit, length] of /** @type {[Intl.RelativeTimeFormatUnit, number][]} */ ([
        ["day", 86400],
        ["hour", 3600],
        ["minute", 60],
    ])) {
        if (-seconds >= length) return format.format(Math.trunc(seconds / length), unit);
    }
    return format.format(0, "minute");
}

/**
 * @param {import("./server.js").Size} dims pixels
 * @returns {string} e.g. "1024 × 1024 · batch 2"
 */
export function dimensions(dims) {
    const parts = [`${dims.width} × ${dims.height}`];
    if (dims.batch > 1) parts.push(t("size.batch", { n: dims.batch }));
    if (dims.controlnet) parts.push("ControlNet");
    return parts.join(" · ");
}

/**
 * @param {number | null | undefined} fraction 0 to 1
 * @returns {string} e.g. "41 %", empty when unknown
 */
export function percent(fraction) {
    return typeof fraction === "number" ? `${Math.floor(fraction * 100)} %` : "";
}
