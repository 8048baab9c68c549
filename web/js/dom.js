/** Building elements. Text always goes through text nodes: nothing here parses HTML. */

/**
 * @typedef {Node | string | number | null | undefined | false | Child[]} Child
 */

/**
 * Make an element.
 *
 * @param {string} tag
 * @param {Object<string, any>} [attributes] `on…` are listeners, `class` and `data-…` and the rest
 *     are attributes; null, undefined and false leave an attribute out, true leaves it empty.
 * @param {...Child} children
 * @returns {HTMLElement}
 */
export function h(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
        if (value === null || value === undefined || value === false) continue;
        if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
        else element.setAttribute(name, value === true ? "" : String(value));
    }
    append(element, children);
    return element;
}

/**
 * @param {HTMLElement} element
 * @param {Child[]} children
 */
function append(element, children) {
    for (const child of children) {
        if (child === null || child === undefined || child === false) continue;
        if (Array.isArray(child)) append(element, child);
        else element.append(child instanceof Node ? child : String(child));
    }
}

/**
 * Replace an element's children and keep the keyboard where it was: data that arrives while
 * somebody tabs through the panel must not throw them back to its start. Elements that can have
 * the focus are recognised by their `data-key`.
 *
 * @param {HTMLElement} element
 * @param {Child[]} children
 */
export function refill(element, children) {
    const active = /** @type {HTMLElement | null} */ (document.activeElement);
    const key = active && element.contains(active) ? active.dataset.key : undefined;
    element.replaceChildren();
    append(element, children);
    if (key === undefined) return;
    const again = element.querySelector(`[data-key="${CSS.escape(key)}"]`);
    if (again instanceof HTMLElement) again.focus({ preventScroll: true });
}

/**
 * A button with an icon of the front end's own icon font.
 *
 * @param {{key: string, label: string, icon?: string, bare?: boolean, danger?: boolean,
 *          disabled?: boolean, onclick: (event: Event) => void}} options `bare` shows only the
 *     icon; the label then stays for screen readers and as a tooltip.
 * @returns {HTMLElement}
 */
export function button({ key, label, icon, bare, danger, disabled, onclick }) {
    return h(
        "button",
        {
            type: "button",
            class: `sy-button${bare ? " sy-bare" : ""}${danger ? " sy-danger" : ""}`,
            "data-key": key,
            "aria-label": bare ? label : null,
            title: bare ? label : null,
            disabled,
            onclick,
        },
        icon && h("i", { class: `pi ${icon}`, "aria-hidden": "true" }),
        !bare && h("span", {}, label),
    );
}
