/** The pack's part of the front end: panel, badges, menus. */

import { app } from "../../scripts/app.js";
import { accelerateWorkflow } from "./js/accelerate.js";
import { BADGE_SETTING, addBadge, hasStatus, redrawBadges, showStatus } from "./js/badge.js";
import { canCompare, compareOnce } from "./js/compare.js";
import { loadTexts, onSetting, setting, t } from "./js/i18n.js";
import { redrawLines, translateLines } from "./js/line.js";
import { toast } from "./js/notify.js";
import { Panel } from "./js/panel.js";
import { addReport, isReport } from "./js/report.js";
import { said } from "./js/said.js";
import { listen } from "./js/server.js";
import { TAB, storedTab } from "./js/tab.js";

const TELL_SETTING = "Switchyard.Build.Notify";

const panel = new Panel();

/** @type {Set<string>} builds under way; what was cancelled or known before is no news */
const building = new Set();

/** The sidebar icon's own small badge: how far the build is. */
function showProgress(/** @type {import("./js/server.js").Build} */ build) {
    const tab = storedTab();
    if (!tab) return;
    const running = build.state === "building";
    tab.iconBadge = running ? `${Math.floor((build.fraction ?? 0) * 100)}%` : null;
}

/** @param {import("./js/server.js").Build} build */
function onBuild(build) {
    showProgress(build);
    if (build.state === "building") {
        building.add(build.id);
        return;
    }
    if (!building.delete(build.id) || setting(TELL_SETTING) === false) return;
    const title = said(build.title);
    if (build.state === "ready") toast("success", t("builds.toastReady", { title }));
    if (build.state === "failed") {
        toast("warn", t("builds.toastFailed", { title, error: said(build.error ?? "") }));
    }
}

function addStyles() {
    const href = new URL("./switchyard.css", import.meta.url).href;
    const link = document.createElement("link");
    link.rel = "stylesheet";
    link.href = href;
    document.head.append(link);
}

function addPanel() {
    const tab = {
        id: TAB,
        icon: "pi pi-bolt",
        iconBadge: null,
        revision: 0,
        title: "Switchyard",
        tooltip: "Switchyard",
        type: "custom",
        render: (/** @type {HTMLElement} */ element) => panel.mount(element),
        destroy: () => panel.unmount(),
    };
    const manager = app.extensionManager;
    if (manager?.sidebarTab?.registerSidebarTab) manager.sidebarTab.registerSidebarTab(tab);
    else manager?.registerSidebarTab?.(tab);
}

app.registerExtension({
    name: "Switchyard",

    settings: [
        {
            id: BADGE_SETTING,
            category: ["Switchyard", "Node", "Badge"],
            name: "Show on each accelerated node what it runs on",
            type: "boolean",
            defaultValue: true,
        },
        {
            id: TELL_SETTING,
            category: ["Switchyard", "Build", "Notify"],
            name: "Tell when an engine has been built",
            type: "boolean",
            defaultValue: true,
        },
    ],

    commands: [
        {
            id: "Switchyard.AccelerateWorkflow",
            label: "Accelerate this workflow",
            icon: "pi pi-bolt",
            function: () => void accelerateWorkflow(),
        },
        {
            id: "Switchyard.CompareOnce",
            label: "Compare once with the host's path",
            icon: "pi pi-arrow-right-arrow-left",
            function: async () => {
                for (const item of app.canvas.selectedItems ?? []) {
                    if (canCompare(item)) await compareOnce(item);
                }
            },
        },
    ],

    menuCommands: [{ path: ["Edit"], commands: ["Switchyard.AccelerateWorkflow"] }],

    async setup() {
        addStyles();
        addPanel();
        listen("switchyard.status", showStatus);
        listen("switchyard.build", onBuild);
        translateLines();
        onSetting("Comfy.Locale", redrawBadges);
        onSetting("Comfy.Locale", redrawLines);
        onSetting(BADGE_SETTING, redrawBadges);
        await loadTexts();
    },

    /** Nodes that were made anew have lost their lines. */
    afterConfigureGraph: redrawLines,

    /** @param {any} node */
    nodeCreated(node) {
        if (hasStatus(node)) addBadge(node);
        if (isReport(node)) addReport(node);
    },

    getCanvasMenuItems() {
        return [
            null,
            { content: t("accelerate.label"), callback: () => void accelerateWorkflow() },
        ];
    },

    /** @param {any} node */
    getNodeMenuItems(node) {
        if (!canCompare(node)) return [];
        return [null, { content: t("compare.label"), callback: () => void compareOnce(node) }];
    },

    /** @param {any} item what is selected */
    getSelectionToolboxCommands(item) {
        return canCompare(item) ? ["Switchyard.CompareOnce"] : [];
    },
});
