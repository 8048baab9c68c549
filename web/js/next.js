/**
 * What the workflow on the canvas will sample on the engine, as far as it can be read from it.
 *
 * Links are followed upwards: through reroutes, bypassed nodes and subgraphs, in and out. What a
 * node of another pack makes of a size or a model is not guessed: then nothing is said.
 */

import { getLink, rootGraph } from "./graph.js";

/** @typedef {import("./server.js").Sampling} Sampling */

/**
 * A node, and the nodes that hold it: of a subgraph, in the graph around it.
 *
 * @typedef {{node: any, outer: Place | null}} Place
 */

const ALWAYS = 0;
const BYPASSED = 4;

/** Links that are followed at most: a workflow may go in a circle. */
const LONGEST = 200;

const LOADERS = { ckpt_name: "checkpoints", unet_name: "diffusion_models" };

const MULTIPLE = 8;

/** @returns {Sampling[]} of every sampler that is on the engine, in the order of the graph */
export function samplings() {
    const found = [];
    for (const place of places(rootGraph(), null)) {
        const sampling = isSampler(place.node) && read(place);
        if (sampling) found.push(sampling);
    }
    return found;
}

/**
 * @param {any} graph
 * @param {Place | null} outer
 * @returns {Generator<Place>} the nodes that run
 */
function* places(graph, outer) {
    for (const node of graph?.nodes ?? []) {
        if (node.mode !== ALWAYS) continue;
        const place = { node, outer };
        if (node.subgraph) yield* places(node.subgraph, place);
        else yield place;
    }
}

/** @param {any} node @returns {boolean} */
function isSampler(node) {
    return (
        ["model", "positive", "latent_image"].every((name) => input(node, name)) &&
        ["steps", "cfg", "sampler_name"].every((name) => widget(node, name))
    );
}

/** @param {Place} place @returns {Sampling | null} */
function read(place) {
    const model = modelOf(place);
    const latent = latentOf(place, "latent_image");
    const [steps, cfg, sampler] = ["steps", "cfg", "sampler_name"].map((n) => value(place, n));
    if (!model || !latent || typeof cfg !== "number" || typeof sampler !== "string") return null;
    const { width, height, batch } = latent;
    const count = stepsOf(place, steps);
    const sides = [width, height].every((side) => isCount(side) && side % MULTIPLE === 0);
    if (!sides || !isCount(batch) || !isCount(count)) return null;
    return {
        ...model,
        width,
        height,
        batch,
        steps: count,
        sampler,
        guided: cfg !== 1 || sampler.includes("cfg_pp"),
        controlnet: hasControlNet(place, "positive", new Set()),
    };
}

/**
 * @param {Place} place
 * @param {any} steps of the whole schedule
 * @returns {number} those that this sampler does, of the advanced one
 */
function stepsOf(place, steps) {
    const [first, last] = ["start_at_step", "end_at_step"].map((name) => value(place, name));
    return Math.min(last ?? steps, steps) - (first ?? 0);
}

/**
 * @param {Place} place
 * @returns {{folder: string, name: string} | null} the file of a model that is accelerated
 */
function modelOf(place) {
    let accelerated = false;
    let at = origin(place, (one) => one.type === "MODEL");
    for (let count = 0; at && count < LONGEST; count += 1) {
        accelerated ||= /^Switchyard(Accelerate|Load(Checkpoint|DiffusionModel))$/.test(
            at.node.type,
        );
        for (const [name, folder] of Object.entries(LOADERS)) {
            if (!widget(at.node, name)) continue;
            const file = value(at, name);
            return accelerated && typeof file === "string" ? { folder, name: file } : null;
        }
        at = origin(at, (one) => one.type === "MODEL");
    }
    return null;
}

/**
 * @param {Place} place
 * @param {string} name of an input
 * @param {number} [left] links to follow
 * @returns {{width: number, height: number, batch: number} | null} pixels
 */
function latentOf(place, name, left = LONGEST) {
    const at = left > 0 ? origin(place, (one) => one.name === name) : null;
    if (!at || widget(at.node, "length")) return null; // a video
    const from = at.node.inputs?.find((one) => one.type === "LATENT")?.name;
    const before = () => (from === undefined ? null : latentOf(at, from, left - 1));
    const [width, height, scale, amount] = ["width", "height", "scale_by", "amount"].map((n) =>
        value(at, n),
    );
    if (width !== undefined && height !== undefined) {
        const batch = value(at, "batch_size") ?? before()?.batch;
        return batch === undefined ? null : { width, height, batch };
    }
    const latent = before();
    if (!latent) return null;
    if (at.node.type === "LatentUpscaleBy") {
        const scaled = (/** @type {number} */ side) =>
            MULTIPLE * Math.round((side / MULTIPLE) * scale);
        return { ...latent, width: scaled(latent.width), height: scaled(latent.height) };
    }
    if (at.node.type === "RepeatLatentBatch") return { ...latent, batch: latent.batch * amount };
    return isSampler(at.node) || at.node.type === "SetLatentNoiseMask" ? latent : null;
}

/**
 * @param {Place} place
 * @param {string} name of an input
 * @param {Set<any>} seen nodes
 * @returns {boolean} whether what comes in there was given to a ControlNet
 */
function hasControlNet(place, name, seen) {
    const at = origin(place, (one) => one.name === name);
    if (!at || seen.has(at.node)) return false;
    seen.add(at.node);
    const inputs = at.node.inputs ?? [];
    return (
        inputs.some((one) => one.type === "CONTROL_NET" && one.link != null) ||
        inputs.some((one) => one.type === "CONDITIONING" && hasControlNet(at, one.name, seen))
    );
}

/**
 * The node whose output comes in, behind reroutes and all that is bypassed.
 *
 * @param {Place} place
 * @param {(input: any) => boolean} which
 * @returns {Place | null}
 */
function origin(place, which) {
    let { node, outer } = place;
    let graph = node.graph;
    let link = linkInto(node, node.inputs?.find(which));
    for (let count = 0; link && count < LONGEST; count += 1) {
        if (isEntry(graph, link)) {
            const name = graph.inputs[link.origin_slot]?.name;
            if (!outer) return null;
            ({ node, outer } = outer);
            graph = node.graph;
            link = linkInto(node, input(node, name));
            continue;
        }
        node = graph.getNodeById(link.origin_id);
        if (!node || (node.mode !== ALWAYS && node.mode !== BYPASSED)) return null;
        const slot = link.origin_slot;
        if (node.mode === BYPASSED) {
            const { type } = node.outputs?.[slot] ?? {};
            link = linkInto(node, node.inputs?.find((one) => one.type === type));
        } else if (node.type === "Reroute") {
            link = linkInto(node, node.inputs?.[0]);
        } else if (node.subgraph) {
            graph = node.subgraph;
            outer = { node, outer };
            link = getLink(graph, graph.outputs[slot]?.linkIds?.[0]);
        } else {
            return { node, outer };
        }
    }
    return null;
}

/**
 * @param {any} graph
 * @param {any} link
 * @returns {boolean} whether the link comes from outside of the subgraph
 */
function isEntry(graph, link) {
    return Boolean(graph.inputNode) && String(link.origin_id) === String(graph.inputNode.id);
}

/**
 * @param {Place} place
 * @param {string} name
 * @returns {any} what a widget holds, or the one that is linked to it; undefined if unknown
 */
function value(place, name) {
    const { node } = place;
    const wired = input(node, name);
    const link = linkInto(node, wired);
    if (!link) return widget(node, name)?.value;
    if (isEntry(node.graph, link)) {
        const outside = node.graph.inputs[link.origin_slot]?.name;
        return place.outer ? value(place.outer, outside) : undefined;
    }
    const at = origin(place, (one) => one === wired);
    return at && /^Primitive/.test(at.node.type) ? at.node.widgets?.[0]?.value : undefined;
}

/** @param {any} node @param {string} name @returns {any} */
function input(node, name) {
    return node.inputs?.find((one) => one.name === name);
}

/** @param {any} node @param {string} name @returns {any} */
function widget(node, name) {
    return node.widgets?.find((one) => one.name === name);
}

/** @param {any} node @param {any} slot @returns {any} */
function linkInto(node, slot) {
    return slot?.link == null ? undefined : getLink(node.graph, slot.link);
}

/** @param {any} number @returns {boolean} */
function isCount(number) {
    return Number.isInteger(number) && number > 0;
}
