/**
 * The sidebar panel: this GPU, what the workflow will take, time saved, builds, the last run,
 * engines and checkpoints.
 */

import { accelerateWorkflow } from "./accelerate.js";
import { advice } from "./advice.js";
import { button, h, refill } from "./dom.js";
import { ago, dimensions, duration, number, percent, size } from "./format.js";
import { loadTexts, onSetting, t } from "./i18n.js";
import { samplings } from "./next.js";
import { confirmDelete, toast } from "./notify.js";
import { said } from "./said.js";
import { listen, server } from "./server.js";

/** @typedef {import("./server.js").Build} Build */
/** @typedef {import("./server.js").Engine} Engine */
/** @typedef {import("./server.js").Run} Run */
/** @typedef {import("./server.js").Checkpoint} Checkpoint */
/** @typedef {import("./server.js").Sampling} Sampling */
/** @typedef {import("./server.js").Prediction} Prediction */

/** Milliseconds between looks at a list that the server is still filling. */
const SCAN_INTERVAL = 1500;

/** Milliseconds between looks at the workflow: front ends tell of changes in many ways. */
const LOOK_INTERVAL = 700;

/** Fewer checkpoints than this are found by eye. */
const FILTER_FROM = 8;

const SECTIONS = /** @type {const} */ (["builds", "run", "engines", "checkpoints"]);

const MODE_TONES = { engine: "good", mixed: "warn", host: "warn", building: "busy" };
const BADGE_TONES = { ready: "good", build: "busy", unsupported: "dim", unreadable: "bad" };

export class Panel {
    constructor() {
        /** @type {HTMLElement | null} */
        this.root = null;
        /** @type {import("./server.js").State | null} */
        this.state = null;
        /** @type {Checkpoint[]} */
        this.checkpoints = [];
        this.scanning = false;
        /** @type {string | null} */
        this.error = null;
        this.filter = "";
        /** What somebody folded stays folded when the panel is opened again. */
        this.folded = new Set(["others"]);
        /** @type {(() => void)[]} */
        this.undo = [];
        /** @type {ReturnType<typeof setTimeout> | undefined} */
        this.timer = undefined;
        /** @type {ReturnType<typeof setInterval> | undefined} */
        this.looking = undefined;
        /** The workflow's samplings that the server was asked about last, as text. */
        this.asked = "[]";
        /** @type {{sampling: Sampling, prediction: Prediction}[]} */
        this.predicted = [];
    }

    /**
     * Show the panel. The front end calls this again with the same element whenever it likes.
     *
     * @param {HTMLElement} container
     */
    mount(container) {
        if (this.root?.parentElement === container) return;
        this.unmount();
        this.root = h("div", { class: "sy-panel" });
        container.replaceChildren(this.root);
        const again = () => void this.refresh();
        this.undo = [
            listen("switchyard.build", (build) => this.onBuild(build)),
            listen("switchyard.run", (run) => this.onRun(run)),
            listen("reconnected", again),
            onSetting("Comfy.Locale", () => this.layout()),
        ];
        this.looking = setInterval(() => void this.lookAhead(), LOOK_INTERVAL);
        void loadTexts().then(() => {
            this.layout();
            again();
        });
    }

    /** Take the panel down; nothing of it keeps running. */
    unmount() {
        for (const stop of this.undo) stop();
        this.undo = [];
        clearTimeout(this.timer);
        clearInterval(this.looking);
        this.root?.remove();
        this.root = null;
    }

    /** Ask the server for everything. */
    async refresh() {
        const root = this.root;
        if (!root) return;
        clearTimeout(this.timer);
        try {
            const [state, library] = await Promise.all([server.state(), server.checkpoints()]);
            this.state = state;
            this.checkpoints = library.checkpoints;
            this.scanning = library.scanning;
            this.error = null;
        } catch (error) {
            this.error = error instanceof Error ? error.message : String(error);
        }
        // The panel may have been closed, or opened anew, while the server answered.
        if (this.root !== root) return;
        this.fill();
        this.asked = ""; // a new engine may be there
        if (this.scanning && !this.error) {
            this.timer = setTimeout(() => void this.refresh(), SCAN_INTERVAL);
        }
    }

    /** Ask the server what the workflow will take, if it has changed. */
    async lookAhead() {
        const { root } = this;
        /** @type {Sampling[]} */
        let found = [];
        try {
            found = samplings();
        } catch (error) {
            console.debug("Switchyard: the workflow could not be read.", error);
        }
        const asked = JSON.stringify(found);
        if (!this.state || this.asked === asked) return;
        this.asked = asked;
        const predicted = [];
        for (const sampling of found) {
            const prediction = await server.predict(sampling).catch(() => null);
            if (this.root !== root || this.asked !== asked) return; // it has changed again
            if (prediction?.seconds != null) predicted.push({ sampling, prediction });
        }
        this.predicted = predicted;
        this.put("next", this.next());
    }

    /** @param {Build} build */
    onBuild(build) {
        if (!this.state) return;
        const builds = this.state.builds;
        const index = builds.findIndex((one) => one.id === build.id);
        const before = builds[index]?.state;
        if (index < 0) builds.push(build);
        else builds[index] = build;
        this.fillBuilds();
        if (build.state === before) return;
        this.say(`${said(build.title)}: ${t(`builds.${build.state}`)}`);
        if (build.state !== "building") void this.refresh();
    }

    /** @param {Run} run */
    onRun(run) {
        if (!this.state) return;
        this.state.last_run = run;
        void this.refresh();
    }

    /**
     * Tell a screen reader.
     *
     * @param {string} text
     */
    say(text) {
        const live = this.root?.querySelector(".sy-live");
        if (live) live.textContent = text;
    }

    /**
     * Do something on the server and show its outcome.
     *
     * @param {() => Promise<string | void>} action returns what to say
     */
    async act(action) {
        try {
            const text = await action();
            if (text) {
                toast("success", text);
                this.say(text);
            }
        } catch (error) {
            toast("error", said(error instanceof Error ? error.message : String(error)));
        }
        await this.refresh();
    }

    /** Build the frame that the data goes into. */
    layout() {
        if (!this.root) return;
        refill(this.root, [
            h(
                "header",
                { class: "sy-header" },
                h("h2", {}, "Switchyard"),
                h("span", { class: "sy-version", "data-part": "version" }),
                button({
                    key: "refresh",
                    label: t("panel.refresh"),
                    icon: "pi-refresh",
                    bare: true,
                    onclick: () => void this.refresh(),
                }),
            ),
            h("div", { "data-part": "error" }),
            h("div", { class: "sy-gpu", "data-part": "gpu" }),
            h("div", { "data-part": "next" }),
            h("div", { class: "sy-box", "data-part": "saved" }),
            button({
                key: "accelerate",
                label: t("accelerate.label"),
                icon: "pi-bolt",
                onclick: () => void accelerateWorkflow(),
            }),
            SECTIONS.map((name) =>
                this.section(name, t(`${name}.title`), h("div", { "data-part": name })),
            ),
            h("div", { class: "sy-live", role: "status" }),
        ]);
        this.fill();
    }

    /**
     * A part that can be folded.
     *
     * @param {string} name
     * @param {string} title
     * @param {import("./dom.js").Child} content
     * @returns {HTMLElement}
     */
    section(name, title, content) {
        return h(
            "details",
            {
                class: "sy-section",
                "data-section": name,
                open: !this.folded.has(name),
                ontoggle: (/** @type {Event} */ event) => {
                    const open = /** @type {HTMLDetailsElement} */ (event.target).open;
                    if (open) this.folded.delete(name);
                    else this.folded.add(name);
                },
            },
            h(
                "summary",
                { "data-key": `section-${name}` },
                h("span", {}, title),
                h("span", { class: "sy-count", "data-part": `${name}-count` }),
            ),
            content,
        );
    }

    /**
     * @param {string} part
     * @param {...import("./dom.js").Child} children
     */
    put(part, ...children) {
        const element = this.root?.querySelector(`[data-part="${part}"]`);
        if (element instanceof HTMLElement) refill(element, children);
    }

    /** Put all data in its places. */
    fill() {
        this.put("error", this.error && this.failure(this.error));
        const state = this.state;
        if (!state) return;
        this.put("version", state.version);
        this.put("gpu", this.gpu());
        this.put("next", this.next());
        this.put("saved", this.saved());
        this.fillBuilds();
        this.put("run", this.run(state.last_run));
        const bytes = state.engines.reduce((sum, engine) => sum + engine.bytes, 0);
        this.put("engines-count", `${state.engines.length} · ${size(bytes)}`);
        this.put(
            "engines",
            state.engines.length
                ? this.engines(state.engines)
                : h("p", { class: "sy-dim" }, t("engines.none")),
        );
        this.put("checkpoints-count", this.scanning ? t("checkpoints.scanning") : this.ready());
        this.fillCheckpoints();
    }

    /**
     * @param {string} message
     * @returns {HTMLElement}
     */
    failure(message) {
        const text = t("panel.error", { message: said(message) });
        return h("p", { class: "sy-error", role: "alert" }, text);
    }

    /** @returns {HTMLElement[]} */
    gpu() {
        const { gpu, host } = this.state;
        const facts = gpu?.capability
            ? [
                  gpu.vram_mib && size(gpu.vram_mib * 1024 * 1024),
                  t("gpu.capability", { capability: gpu.capability }),
                  gpu.timed_calls
                      ? t("gpu.timed", { n: number(gpu.timed_calls) })
                      : t("gpu.notTimed"),
              ]
            : [gpu?.problem ? said(gpu.problem) : t(gpu ? "gpu.cpu" : "gpu.noneWhy")];
        return [
            h("div", { class: "sy-strong" }, gpu ? gpu.name : t("gpu.none")),
            h("div", { class: "sy-dim" }, facts.filter(Boolean).join(" · ")),
            h(
                "div",
                { class: "sy-dim" },
                [
                    host.comfyui && `ComfyUI ${host.comfyui}`,
                    host.torch && `PyTorch ${host.torch}`,
                    t(host.dynamic_vram ? "gpu.dynamic" : "gpu.static"),
                ]
                    .filter(Boolean)
                    .join(" · "),
            ),
        ];
    }

    /** @returns {import("./dom.js").Child} nothing where nothing is known */
    next() {
        if (!this.predicted.length) return null;
        return h(
            "div",
            { class: "sy-box" },
            h("span", { class: "sy-dim" }, t("next.title")),
            this.predicted.map(({ sampling, prediction }) => [
                h(
                    "span",
                    { class: "sy-strong" },
                    t("next.about", {
                        time: duration(prediction.seconds),
                        size: size(prediction.bytes),
                    }),
                ),
                h(
                    "span",
                    { class: "sy-dim" },
                    [
                        dimensions(sampling),
                        t("next.steps", { n: sampling.steps }),
                        sampling.controlnet && t("next.controlnet"),
                    ]
                        .filter(Boolean)
                        .join(" · "),
                ),
            ]),
            h("span", { class: "sy-dim" }, t("next.rest")),
        );
    }

    /** @returns {HTMLElement[]} */
    saved() {
        const { saved_seconds: seconds, runs, engine_calls: calls } = this.state.totals;
        return [
            h("span", { class: "sy-dim" }, t("saved.title")),
            h("span", { class: "sy-big" }, duration(Math.max(seconds, 0))),
            h(
                "span",
                { class: "sy-dim" },
                t("saved.detail", { runs: number(runs), calls: number(calls) }),
            ),
        ];
    }

    fillBuilds() {
        const builds = this.state.builds.filter((build) => build.state !== "ready");
        const section = this.root?.querySelector('[data-section="builds"]');
        section?.toggleAttribute("hidden", builds.length === 0);
        this.put("builds-count", builds.length || "");
        this.put("builds", h("ul", { class: "sy-list" }, builds.map((one) => this.build(one))));
    }

    /**
     * @param {Build} build
     * @returns {HTMLElement}
     */
    build(build) {
        const { id, state, fraction, text, error } = build;
        const title = said(build.title);
        const running = state === "building";
        const known = typeof fraction === "number";
        return h(
            "li",
            { class: "sy-item", "data-build": id },
            h(
                "div",
                { class: "sy-row" },
                h("span", { class: "sy-strong" }, title),
                pill(
                    running ? `${t("builds.building")} ${percent(fraction)}` : t(`builds.${state}`),
                    running ? "busy" : state === "failed" ? "bad" : "dim",
                ),
                button(
                    running
                        ? {
                              key: `cancel-${id}`,
                              label: t("builds.cancel"),
                              icon: "pi-times",
                              onclick: () => void this.act(() => server.cancelBuild(id)),
                          }
                        : {
                              key: `retry-${id}`,
                              label: t("builds.retry"),
                              icon: "pi-replay",
                              onclick: () => void this.act(() => server.retryBuild(id)),
                          },
                ),
            ),
            running &&
                h("progress", {
                    class: "sy-progress",
                    max: 1,
                    value: known ? fraction : null,
                    "aria-label": title,
                }),
            running && text && h("div", { class: "sy-dim" }, said(text)),
            !running && error && h("div", { class: "sy-why" }, said(error)),
        );
    }

    /**
     * @param {Run | null} run
     * @returns {import("./dom.js").Child}
     */
    run(run) {
        this.put("run-count", run?.speedup ? `${number(run.speedup, 1)}x` : "");
        if (!run) return h("p", { class: "sy-dim" }, t("run.none"));
        const ms = Array.isArray(run.engine_ms) ? run.engine_ms[0] : run.engine_ms;
        const facts = [
            t("run.steps", { n: run.steps, engine: run.engine_calls }),
            ms && t("run.ms", { ms: number(ms, ms < 10 ? 1 : 0) }),
            duration(run.seconds),
            ...run.dims.map(dimensions),
            run.loras > 0 && `${run.loras} LoRA`,
            run.controlnets > 0 && `${run.controlnets} ControlNet`,
            run.graphs > 0 && t("run.graphs", { n: run.graphs }),
            run.captures > 0 && t("run.captures", { n: run.captures }),
            run.swaps_ms >= 1 && t("run.swaps", { ms: number(run.swaps_ms) }),
            run.vram_bytes > 0 && t("run.vram", { size: size(run.vram_bytes) }),
            typeof run.compared_db === "number" &&
                t("run.compared", { db: number(run.compared_db) }),
        ];
        const slowed = run.error || run.compiling || run.graphs || run.captures;
        const fine = run.mode !== "engine" || !(slowed || run.swaps_ms >= 1);
        return [
            h(
                "div",
                { class: "sy-row" },
                h("span", { class: "sy-strong sy-name", title: run.model }, run.model),
                pill(t(`run.mode.${run.mode}`), MODE_TONES[run.mode]),
            ),
            h("div", { class: "sy-dim" }, facts.filter(Boolean).join(" · ")),
            run.reasons.length
                ? h(
                      "ul",
                      { class: "sy-reasons" },
                      run.reasons.map((reason) => this.reason(reason)),
                  )
                : fine && h("p", { class: "sy-dim" }, t(`run.fine.${run.mode}`)),
            run.compiling && h("p", { class: "sy-dim" }, t("run.compiling")),
            run.error && h("p", { class: "sy-why" }, t("run.error", { error: said(run.error) })),
        ];
    }

    /**
     * @param {import("./server.js").Reason} reason
     * @returns {HTMLElement}
     */
    reason(reason) {
        return h(
            "li",
            {},
            reason.node && h("div", { class: "sy-strong" }, said(reason.node)),
            h("div", {}, said(reason.text)),
            h("div", { class: "sy-advice" }, advice(reason)),
        );
    }

    /**
     * @param {Engine[]} engines
     * @returns {HTMLElement[]} those in use first; what only came along is folded away
     */
    engines(engines) {
        const inUse = (/** @type {Engine} */ one) =>
            one.loaded || one.source === "built" || one.last_used !== null;
        const recent = (/** @type {Engine} */ one) => (one.loaded ? Infinity : one.last_used ?? 0);
        const used = engines.filter(inUse).sort((a, b) => recent(b) - recent(a) || 0);
        const others = engines.filter((one) => !inUse(one));
        return [
            h(
                "ul",
                { class: "sy-list" },
                used.map((one) => this.engine(one)),
            ),
            others.length > 0 &&
                this.section(
                    "others",
                    t("engines.others", { n: others.length }),
                    h(
                        "ul",
                        { class: "sy-list" },
                        others.map((one) => this.engine(one)),
                    ),
                ),
        ];
    }

    /**
     * @param {Engine} engine
     * @returns {HTMLElement}
     */
    engine(engine) {
        const { id, family, structure, bytes, source, sizes } = engine;
        const title = said(engine.title);
        return h(
            "li",
            { class: "sy-item", "data-engine": id },
            h(
                "div",
                { class: "sy-row" },
                h("span", { class: "sy-strong" }, title || family),
                engine.loaded && pill(t("engines.loaded"), "good"),
                engine.deletable &&
                    button({
                        key: `delete-${id}`,
                        label: t("engines.delete", { title }),
                        icon: "pi-trash",
                        bare: true,
                        danger: true,
                        onclick: () => void this.deleteEngine(engine),
                    }),
            ),
            h(
                "div",
                { class: "sy-dim" },
                [
                    family,
                    size(bytes),
                    t(`engines.${source}`),
                    engine.vram_mib > 0 && t("run.vram", { size: size(engine.vram_mib * 2 ** 20) }),
                    t("engines.used", { when: ago(engine.last_used) }),
                ]
                    .filter(Boolean)
                    .join(" · "),
            ),
            sizes.length > 0 &&
                h(
                    "div",
                    { class: "sy-chips", "aria-label": t("engines.sizes") },
                    sizes.map((dims) => h("span", { class: "sy-chip" }, dimensions(dims))),
                ),
            h("code", { class: "sy-hash", title: t("engines.structure") }, structure),
        );
    }

    /** @param {Engine} engine */
    async deleteEngine(engine) {
        const sure = await confirmDelete(t("engines.confirmTitle"), t("engines.confirm"), [
            `${said(engine.title)} · ${size(engine.bytes)}`,
        ]);
        if (!sure) return;
        await this.act(async () => {
            const { freed_bytes: freed } = await server.deleteEngine(engine.id);
            return t("engines.deleted", { title: said(engine.title), size: size(freed) });
        });
    }

    /** @returns {string} */
    ready() {
        const ready = this.checkpoints.filter((one) => one.badge === "ready").length;
        return t("checkpoints.count", { ready, n: this.checkpoints.length });
    }

    fillCheckpoints() {
        const wanted = this.filter.trim().toLowerCase();
        const shown = this.checkpoints.filter((one) => one.name.toLowerCase().includes(wanted));
        const list = h(
            "ul",
            { class: "sy-list" },
            shown.map((one) => this.checkpoint(one)),
        );
        const part = this.root?.querySelector('[data-part="checkpoints"]');
        const old = part?.querySelector(".sy-list");
        const filtered = Boolean(part?.querySelector(".sy-filter"));
        if (old && filtered && this.checkpoints.length >= FILTER_FROM) {
            // The box that somebody is typing into stays.
            old.replaceWith(list);
            return;
        }
        this.put(
            "checkpoints",
            this.checkpoints.length >= FILTER_FROM && this.filterBox(),
            this.checkpoints.length || this.scanning
                ? list
                : h("p", { class: "sy-dim" }, t("checkpoints.none")),
        );
    }

    /** @returns {HTMLElement} */
    filterBox() {
        return h("input", {
            class: "sy-filter",
            type: "search",
            "data-key": "filter",
            placeholder: t("checkpoints.filter"),
            "aria-label": t("checkpoints.filter"),
            value: this.filter,
            oninput: (/** @type {Event} */ event) => {
                this.filter = /** @type {HTMLInputElement} */ (event.target).value;
                this.fillCheckpoints();
            },
        });
    }

    /**
     * @param {Checkpoint} checkpoint
     * @returns {HTMLElement}
     */
    checkpoint({ name, folder, title, family, badge, why }) {
        const cut = Math.max(name.lastIndexOf("/"), name.lastIndexOf("\\")) + 1;
        return h(
            "li",
            { class: "sy-item", "data-checkpoint": name },
            h(
                "div",
                { class: "sy-row" },
                h("span", { class: "sy-name", title: name }, name.slice(cut)),
                pill(t(`checkpoints.${badge}`), BADGE_TONES[badge]),
            ),
            h(
                "div",
                { class: "sy-dim" },
                [title ? said(title) : family, folder].filter(Boolean).join(" · "),
            ),
            why && h("div", { class: "sy-why" }, said(why)),
        );
    }
}

/**
 * @param {string} text
 * @param {"good" | "warn" | "bad" | "busy" | "dim"} tone
 * @returns {HTMLElement}
 */
function pill(text, tone) {
    return h("span", { class: `sy-pill sy-${tone}` }, text);
}
