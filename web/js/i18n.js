/**
 * The pack's texts in the front end's language.
 *
 * The front end merges `locales/` into its own messages but does not export its translator, so the
 * same data is read again from where it gets them. English is the fall-back for a missing key.
 */

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

/** @type {Object<string, any>} messages of all packs by language */
let messages = {};

/** @type {Promise<void> | undefined} */
let loading;

/** @returns {Promise<void>} once the texts are there; a failure leaves the keys visible */
export function loadTexts() {
    loading ??= (async () => {
        try {
            messages = await (await api.fetchApi("/i18n")).json();
        } catch (error) {
            console.warn("Switchyard: the translations could not be read.", error);
        }
    })();
    return loading;
}

/** @returns {string} the language chosen in the settings, e.g. "en" or "zh" */
export function locale() {
    return setting("Comfy.Locale") ?? "en";
}

/**
 * A setting's value on every front end that we support.
 *
 * @param {string} id
 * @returns {any}
 */
export function setting(id) {
    return app.extensionManager?.setting?.get(id) ?? app.ui?.settings?.getSettingValue?.(id);
}

/**
 * Call back whenever a setting has changed.
 *
 * @param {string} id
 * @param {() => void} callback
 * @returns {() => void} stops it
 */
export function onSetting(id, callback) {
    const settings = app.ui?.settings;
    // The event comes just before the value is there to be read.
    const listener = () => queueMicrotask(callback);
    settings?.addEventListener?.(`${id}.change`, listener);
    return () => settings?.removeEventListener?.(`${id}.change`, listener);
}

/**
 * @param {string} key below `switchyard` in main.json
 * @returns {any} the text or the table of texts in the chosen language alone
 */
export function translated(key) {
    return find(locale(), key);
}

/** @param {string} language @param {string} key @returns {any} */
function find(language, key) {
    return key.split(".").reduce((node, part) => node?.[part], messages[language]?.switchyard);
}

/**
 * @param {string} key below `switchyard` in main.json
 * @param {Object<string, string | number>} [values] for the `{name}` places
 * @returns {string}
 */
export function t(key, values = {}) {
    const text = find(locale(), key) ?? find("en", key);
    if (typeof text !== "string") return key;
    return text.replace(/\{(\w+)\}/g, (place, name) => String(values[name] ?? place));
}
