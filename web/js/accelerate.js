/** "Accelerate this workflow": the node after every loader's MODEL output. */

import { app } from "../../../scripts/app.js";
import { getLink, rootGraph } from "./graph.js";
import { t } from "./i18n.js";
import { toast } from "./notify.js";

export const NODE = "SwitchyardAccelerate";

/** Between nodes, in the canvas's units. */
const GAP = 40;

/**
 * Insert the node after every loader, subgraphs included, as one step for undo. Loaders whose
 * models reach an accelerated node anyway are left as they are, so a second time changes nothing.
 *
 * @returns {number} nodes inserted
 */
export function accelerateWorkflow() {
    const canvas = app.canvas;
    const root = rootGraph();
    const graphs = allGraphs(root);
    const loaders = graphs.flatMap((graph) => graph.nodes.filter(isLoader));
    let inserted = 0;
    // Between these two, changes are one step for undo, however many each call makes itself.
    canvas.emitBeforeChange?.();
    try {
        for (const loader of loaders) inserted += accelerateLoader(loader, graphs);
        // Otherwise the order is found out later, and that would be a step for undo of its own.
        if (inserted) for (const graph of graphs) graph.updateExecutionOrder?.();
    } finally {
        canvas.emitAfterChange?.();
        root.setDirtyCanvas?.(true, true);
    }
    if (inserted) {
        toast("success", t("accelerate.done", { n: inserted }));
    } else {
        toast("info", t(loaders.length ? "accelerate.already" : "accelerate.none"));
    }
    return inserted;
}

/**
 * @param {any} root
 * @returns {any[]} it and the subgraphs in use, each once
 */
function allGraphs(root) {
    const graphs = new Set([root]);
    for (const graph of graphs) {
        // A set's iteration goes on over what is added meanwhile.
        for (const node of graph.nodes) if (node.subgraph) graphs.add(node.subgraph);
    }
    return [...graphs];
}

/**
 * @param {any} node
 * @returns {boolean} whether it makes a MODEL and takes none. Virtual nodes only pass on what
 *     another node made.
 */
function isLoader(node) {
    return (
        !node.subgraph &&
        !node.isVirtualNode &&
        !/^Switchyard/.test(node.type) &&
        Boolean(node.outputs?.some((output) => output.type === "MODEL")) &&
        !node.inputs?.some((input) => input.type === "MODEL")
    );
}

/**
 * @param {any} loader
 * @param {any[]} graphs
 * @returns {number} nodes inserted
 */
function accelerateLoader(loader, graphs) {
    let inserted = 0;
    for (const [slot, output] of loader.outputs.entries()) {
        if (output.type !== "MODEL") continue;
        const links = (output.links ?? [])
            .map((id) => getLink(loader.graph, id))
            .filter((link) => link && !reachesNode(loader.graph, link, graphs, new Set()));
        if (links.length && insertNode(loader, slot, links)) inserted += 1;
    }
    return inserted;
}

/**
 * Whether the model of a link goes through an accelerated node later on.
 *
 * @param {any} graph
 * @param {any} link
 * @param {any[]} graphs
 * @param {Set<any>} seen links
 * @returns {boolean}
 */
function reachesNode(graph, link, graphs, seen) {
    if (!link || seen.has(link)) return false;
    seen.add(link);
    /** @param {any} inside @param {Iterable<any>} ids */
    const follow = (inside, ids) =>
        [...(ids ?? [])].some((id) => reachesNode(inside, getLink(inside, id), graphs, seen));
    const exit = subgraphOutput(graph, link);
    if (exit) {
        return graphs.some((outside) =>
            outside.nodes.some(
                (node) =>
                    node.subgraph === graph &&
                    follow(outside, node.outputs[link.target_slot]?.links),
            ),
        );
    }
    const node = graph.getNodeById(link.target_id);
    if (!node) return false;
    if (node.type === NODE) return true;
    if (node.subgraph) {
        const name = node.inputs[link.target_slot]?.name;
        const entry = node.subgraph.inputs.find((input) => input.name === name);
        return follow(node.subgraph, entry?.linkIds);
    }
    return (node.outputs ?? []).some(
        // "*": reroutes, and packs' switches
        (output) => ["MODEL", "*"].includes(output.type) && follow(graph, output.links),
    );
}

/**
 * Put a node behind an output and hang the links on the node, reroutes and all.
 *
 * @param {any} loader
 * @param {number} slot
 * @param {any[]} links
 * @returns {boolean} false if the server has no such node
 */
function insertNode(loader, slot, links) {
    const { graph } = loader;
    const node = window.LiteGraph.createNode(NODE);
    if (!node) return false;
    // Read before anything is connected: making a connection takes the old link apart.
    const targets = links.map((link) => ({
        exit: subgraphOutput(graph, link),
        node: graph.getNodeById(link.target_id),
        slot: link.target_slot,
        reroute: link.parentId,
    }));
    graph.add(node);
    node.pos = freePlace(loader, node);
    loader.connect(slot, node, node.inputs.findIndex((input) => input.type === "MODEL"));
    for (const target of targets) {
        if (target.exit) target.exit.connect(node.outputs[0], node, target.reroute);
        else if (target.node) node.connect(0, target.node, target.slot, target.reroute);
    }
    return true;
}

/**
 * A place right of the loader that covers no other node: as high as the loader, or else above its
 * neighbours, going up.
 *
 * @param {any} loader
 * @param {any} node
 * @returns {[number, number]}
 */
function freePlace(loader, node) {
    const title = window.LiteGraph.NODE_TITLE_HEIGHT ?? 30;
    const [width, height] = [node.size[0], node.size[1] + title];
    const x = loader.pos[0] + loader.size[0] + GAP;
    let y = loader.pos[1];
    const others = loader.graph.nodes.filter((other) => other !== node);
    for (let tries = 0; tries <= others.length; tries += 1) {
        const covered = others.find(
            (other) =>
                x < other.pos[0] + other.size[0] + GAP / 2 &&
                other.pos[0] < x + width + GAP / 2 &&
                y - title < other.pos[1] + other.size[1] + GAP / 2 &&
                other.pos[1] - title < y - title + height + GAP / 2,
        );
        if (!covered) break;
        y = covered.pos[1] - title - GAP / 2 - node.size[1];
    }
    return [x, y];
}

/**
 * @param {any} graph
 * @param {any} link
 * @returns {any} the slot by which the link leaves its subgraph, if it does
 */
function subgraphOutput(graph, link) {
    const exit = graph.outputNode;
    return exit && String(link.target_id) === String(exit.id)
        ? graph.outputs[link.target_slot]
        : undefined;
}
