/** The pack's routes and events. See the pack's server for what the fields mean. */

import { api } from "../../../scripts/api.js";

/**
 * @typedef {{width: number, height: number, batch: number, controlnet?: boolean}} Size pixels
 *
 * @typedef {Object} Engine
 * @property {string} id
 * @property {string} family
 * @property {string} title
 * @property {string} structure
 * @property {number} bytes on disk
 * @property {"shipped" | "built"} source
 * @property {Size[]} sizes captured so far
 * @property {number | null} last_used seconds since 1970
 * @property {boolean} loaded
 * @property {number} vram_mib
 * @property {boolean} deletable
 *
 * @typedef {Object} Build
 * @property {string} id
 * @property {string} title
 * @property {"ready" | "building" | "failed" | "cancelled" | "unknown"} state
 * @property {number | null} fraction 0 to 1
 * @property {string | null} text
 * @property {string | null} error
 *
 * @typedef {{text: string, node: string | null}} Reason
 *
 * @typedef {Object} Run
 * @property {number} id
 * @property {string} model
 * @property {"engine" | "host" | "building" | "mixed"} mode
 * @property {number} steps
 * @property {number} engine_calls
 * @property {number} host_calls
 * @property {number} seconds
 * @property {number | number[] | null} engine_ms per call
 * @property {Size[]} dims
 * @property {number} loras
 * @property {number} controlnets
 * @property {Reason[]} reasons
 * @property {number} graphs CUDA graphs captured during this run
 * @property {number} captures networks captured during this run
 * @property {number} vram_bytes
 * @property {number} swaps_ms bringing in weights
 * @property {boolean} compiling whether libraries stood in for kernels
 * @property {number | null} compared_db
 * @property {string | null} error what ended it early
 * @property {number | null} saved_seconds
 * @property {number | null} speedup
 *
 * @typedef {Object} State
 * @property {string} version
 * @property {{name: string, capability: string | null, vram_mib: number | null,
 *             timed_calls: number, problem?: string | null} | null} gpu timed_calls: calls of
 *     operators that were timed on such a GPU. problem: why no engine runs there
 * @property {{comfyui: string, dynamic_vram: boolean, torch: string}} host
 * @property {Engine[]} engines
 * @property {Build[]} builds
 * @property {{saved_seconds: number, runs: number, engine_calls: number}} totals
 * @property {Run | null} last_run
 *
 * @typedef {Object} Checkpoint
 * @property {string} name
 * @property {"checkpoints" | "diffusion_models" | "controlnet"} folder
 * @property {string | null} family
 * @property {string | null} title
 * @property {"ready" | "build" | "unsupported" | "unreadable"} badge
 * @property {string | null} why
 *
 * @typedef {Object} Sampling what is about to be sampled
 * @property {string} folder of the model's file: "checkpoints" or "diffusion_models"
 * @property {string} name
 * @property {number} width pixels
 * @property {number} height
 * @property {number} batch images at once
 * @property {number} steps
 * @property {string} sampler
 * @property {boolean} guided whether the network also answers without the prompt
 * @property {boolean} controlnet
 *
 * @typedef {{seconds: number | null, bytes: number | null}} Prediction null: not known
 *
 * @typedef {{node_id: string, state: "build" | "engine" | "host" | "off", text: string}} Status
 */

/**
 * @param {string} path below /switchyard/
 * @param {object} [body] a POST when given
 * @returns {Promise<any>}
 * @throws {Error} with the server's own line
 */
async function call(path, body) {
    const response = await api.fetchApi(
        `/switchyard/${path}`,
        body && {
            method: "POST",
            headers: { "Content-Type": "application/json" },
            body: JSON.stringify(body),
        },
    );
    const data = await response.json().catch(() => null);
    if (!response.ok) throw new Error(data?.error ?? `HTTP ${response.status}`);
    return data;
}

export const server = {
    /** @returns {Promise<State>} */
    state: () => call("state"),
    /** @returns {Promise<{checkpoints: Checkpoint[], scanning: boolean}>} */
    checkpoints: () => call("checkpoints"),
    /** @param {string} id @returns {Promise<{freed_bytes: number}>} */
    deleteEngine: (id) => call("engines/delete", { id }),
    /** @param {string} id */
    cancelBuild: (id) => call("builds/cancel", { id }),
    /** @param {string} id */
    retryBuild: (id) => call("builds/retry", { id }),
    /** @param {Sampling} sampling @returns {Promise<Prediction>} */
    predict: (sampling) => call("predict", sampling),
};

/**
 * Listen to an event of the server.
 *
 * @param {string} name
 * @param {(detail: any) => void} callback
 * @returns {() => void} stops listening
 */
export function listen(name, callback) {
    const listener = (/** @type {CustomEvent} */ event) => callback(event.detail);
    api.addEventListener(name, listener);
    return () => api.removeEventListener(name, listener);
}
