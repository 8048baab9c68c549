"""What an engine cannot do for ComfyUI, told before the host is asked to load anything.

Default deny. The network's result depends on its weights, its inputs and on what others have put
into it: patches in `transformer_options`, objects in place of its layers, hooks, another attention.
The first two an engine follows; of the rest it does what is listed here as harmless, and for
anything else a run goes to the host's own path. What lies around the network (CFG, samplers,
schedules, masks, areas, previews) is the host's business and stays untouched, unless it sends the
network back to work with patches of its own, which its code shows.

Each reason is one clause in plain words, with the node's name as the user sees it if it is known.
"""

from __future__ import annotations

import functools
import re
import sys
import weakref
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from types import CodeType, FrameType, FunctionType, MethodType
from typing import Any

import comfy.ldm.modules.attention as attention
import comfy.ldm.modules.diffusionmodules.openaimodel as openaimodel
import comfy.model_management as management
import comfy.utils
from comfy import patcher_extension
from torch import Tensor, nn

from ...errors import DeviceUnavailable
from ...hardware import require
from ...models import unsupported_state
from ...models.calls import HARMLESS_OPTIONS
from ...models.unet_live import network_kind


@dataclass(frozen=True)
class Reason:
    """Why something runs on the host's own path.

    text: one clause, such as "FreeU changes the up blocks". node: the name of the node that asked
    for it, as the user sees it, or of its pack; None where that cannot be known. learned: what an
    earlier run alone speaks against, for `forget`.
    """

    text: str
    node: str | None = None
    learned: frozenset[CodeType] = field(default=frozenset(), compare=False, repr=False)


# Whole MODELs.


def unsupported_model(patcher: Any) -> str | None:
    """Why a MODEL cannot be accelerated at all, in one line; None where it can.

    Looks at the patcher's class, the model's class and the network's layers. Reads no weight and
    changes nothing.
    """
    if not hasattr(patcher_extension, "WrappersMP") or not hasattr(
        patcher_extension.WrappersMP, "PREPARE_SAMPLING"
    ):
        return "this ComfyUI is too old: it lacks wrappers around sampling"
    foreign = foreign_class(patcher, patcher.model)
    if foreign is not None:
        return foreign
    model = patcher.model
    module = getattr(model, "diffusion_model", None)
    if not isinstance(module, nn.Module) or network_kind(module) != "unet":
        return f"{type(model).__name__} is not supported: Stable Diffusion 1, 2 and XL are"
    if _quantised(model, module):
        return "its weights are quantised"
    device = unsupported_device(patcher)
    if device is not None:
        return device
    with pristine(patcher):
        return network_state(module)


@contextmanager
def pristine(patcher: Any) -> Iterator[None]:
    """The network without what the host has put into it for the MODEL that sampled last.

    A MODEL's clones share one network. The host leaves the injections and object patches of one in
    place until another is loaded, so what is found there before may concern this MODEL, or not.
    """
    model = patcher.model
    loaded = [entry.model for entry in management.current_loaded_models]
    sharing = [other for other in loaded if other is not None and patcher.is_clone(other)]
    with ExitStack() as stack:
        for other in sharing:
            stack.enter_context(other.use_ejected())
        for path, original in patcher.object_patches_backup.items():
            if path.startswith("diffusion_model."):
                current = comfy.utils.set_attr(model, path, original)
                stack.callback(comfy.utils.set_attr, model, path, current)
        yield


def unsupported_device(patcher: Any) -> str | None:
    """Why no engine runs on the device that a patcher's model is for, or None."""
    try:
        require(patcher.load_device)
    except DeviceUnavailable as error:
        return str(error)
    return None


def foreign_class(*owners: Any) -> str | None:
    """What is said of objects of which one is of a class that another pack wrote."""
    for owner in owners:
        foreign = next((kind for kind in type(owner).__mro__ if not _trusted(kind)), None)
        if foreign is not None:
            return f"{_pack(foreign) or 'another pack'} has its own way with it: {foreign.__name__}"
    return None


def _trusted(kind: type) -> bool:
    """Whether a class is ComfyUI's own, PyTorch's or ours."""
    ours = __name__.rpartition(".")[0] + "."
    return kind is object or kind.__module__.startswith(("comfy.", "torch.", ours))


def _quantised(model: Any, module: nn.Module) -> bool:
    config = getattr(model, "model_config", None)
    # An attribute that is not there makes ComfyUI's configurations warn.
    if config is not None and getattr(type(config), "quant_config", None) is not None:
        return True
    if config is not None and vars(config).get("quant_config") is not None:
        return True
    return any(
        kind.__name__ == "QuantizedTensor"
        for parameter in module.parameters()
        for kind in (*type(parameter).__mro__, *type(parameter.data).__mro__)
    )


# The network's layers: read in full once, then looked at only where they may have changed.

# Names under which an attribute of one layer takes the place of its class's method.
_METHODS = frozenset(
    ("forward", "_forward", "_conv_forward", "_call_impl", "forward_comfy_cast_weights")
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# Functions outside the classes that compute part of a forward.
_FUNCTIONS = (
    (openaimodel, ("forward_timestep_embed", "apply_control", "timestep_embedding")),
    (attention, ("optimized_attention", "optimized_attention_masked")),
)


class _Layers:
    """The layers of a network as they were when `unsupported_state` read them."""

    def __init__(self, module: nn.Module) -> None:
        layers = list(module.modules())
        for layer in layers:
            _drop_remains(layer)
        self._attributes = [vars(layer) for layer in layers]
        self._hooks = [vars(layer)[name] for layer in layers for name in _HOOKS]
        self._children = [
            (layer._modules, list(layer._modules.values())) for layer in layers if layer._modules
        ]
        self._convolutions = [vars(layer) for layer in layers if isinstance(layer, nn.Conv2d)]
        self._classes = {base for layer in layers for base in type(layer).__mro__}
        self._methods = self._current_methods()
        self.reason = unsupported_state(module, patches_applied=True) or self._replaced()

    def _current_methods(self) -> dict[tuple[type, str], Any]:
        return {
            (kind, name): vars(kind)[name]
            for kind in self._classes
            for name in _METHODS
            if name in vars(kind)
        }

    def _replaced(self) -> str | None:
        """Methods that were replaced before anybody could look, by where they come from."""
        for (kind, name), method in self._methods.items():
            origin = getattr(method, "__module__", None) or ""
            if _trusted(kind) and not origin.startswith(("comfy.", "torch.")):
                who = _pack(method) or origin
                return f"{who} has replaced {kind.__name__}.{name} for all models"
        return None

    def unchanged(self) -> bool:
        """Whether nobody has put anything into the network since. Takes half a millisecond."""
        return (
            not any(self._hooks)
            and all(found.keys().isdisjoint(_METHODS) for found in self._attributes)
            and all(list(now.values()) == then for now, then in self._children)
            and all(found["padding_mode"] == "zeros" for found in self._convolutions)
            and self._current_methods() == self._methods
        )


def _drop_remains(layer: nn.Module) -> None:
    """Where a method was replaced, the host puts the class's own back as the layer's attribute."""
    for name in _METHODS & vars(layer).keys():
        left = vars(layer)[name]
        owner = getattr(left, "__self__", None)
        if owner is layer and left.__func__ is getattr(type(layer), name, None):
            delattr(layer, name)


_read: weakref.WeakKeyDictionary[nn.Module, _Layers] = weakref.WeakKeyDictionary()


def called_elsewhere(module: nn.Module) -> bool:
    """Whether calls of the network may lead past its class's own forward. Takes no time."""
    origin = getattr(module.forward, "__module__", None) or ""
    return "forward" in vars(module) or not origin.startswith("comfy.")


def network_state(module: nn.Module) -> str | None:
    """Why this network would not compute what its architecture and weights say, or None.

    Looks at every layer, and at what a network shares with all others of its kind. The first look
    takes some 40 ms for SDXL, later ones less than one while nothing has changed.
    """
    for owner, names in _FUNCTIONS:
        for name in names:
            function = getattr(owner, name, None)
            origin = getattr(function, "__module__", None) or ""
            if function is not None and not origin.startswith("comfy."):
                return f"{_pack(function) or origin} has replaced {name} for all models"
    layers = _read.get(module)
    if layers is None or layers.reason is not None or not layers.unchanged():
        layers = _read[module] = _Layers(module)
    return layers.reason


# Runs.


def why_host_run(patcher: Any, model_options: Mapping[str, Any], conds: Any) -> list[Reason]:
    """Every reason, visible before sampling, why a run needs the host's own path.

    patcher: the MODEL as the sampler has it. model_options: what it samples with. conds: the
    conditioning by kind, as `PREPARE_SAMPLING` wrappers get it. Changes nothing.
    """
    with pristine(patcher):
        state = network_state(patcher.model.diffusion_model)
    found = [Reason(state)] if state is not None else []
    found += _changed_patcher(patcher)
    found += _options(model_options.get("transformer_options") or {})
    found += _changed_conds(conds)
    found += _outer_reasons(patcher, model_options)
    if model_options.get("context_handler") is not None:
        found.append(Reason("context windows cut the prompt up in mid-run", "Context Windows"))
    return list(dict.fromkeys(found))


def why_host_call(
    transformer_options: Mapping[str, Any], kwargs: Mapping[str, Any]
) -> Reason | None:
    """Why one call of the denoiser needs the host's path: the first reason, with its node.

    kwargs: the call's further arguments by name. None: nothing here speaks against the engine.
    """
    for reason in _options(transformer_options):
        return reason
    for name in ("num_video_frames", "time_context", "image_only_indicator"):
        if kwargs.get(name) is not None:
            return Reason(f"an argument of video models is given: {name}")
    return None


# The patcher.

# Objects of the model that others may replace: what is computed around the network with them does
# not change the network.
_HARMLESS_OBJECTS = {"latent_format", "model_sampling"}


def _changed_patcher(patcher: Any) -> Iterator[Reason]:
    for problem in (foreign_class(patcher, patcher.model), unsupported_device(patcher)):
        if problem is not None:
            yield Reason(problem)
    for path, value in patcher.object_patches.items():
        if path in _HARMLESS_OBJECTS:
            continue
        node = _node(value)
        if path == "manual_cast_dtype":
            # Select Model Device does it too, and leaves this.
            known = not hasattr(patcher.model, "_select_base_load_device")
            node = "ModelComputeDtype" if known else None
            yield Reason(f"the model is set to compute in {value}", node)
        elif path.partition(".")[0] == "diffusion_model":
            layer = path.removeprefix("diffusion_model.").removesuffix(".forward")
            yield Reason(f"{node or 'another pack'} replaces a part of the network ({layer})", node)
        else:
            yield Reason(f"{node or 'another pack'} replaces a part of the model ({path})", node)
    for key, injections in getattr(patcher, "injections", {}).items():
        if not injections:
            continue
        if key == "bypass_lora":
            yield Reason("a LoRA is loaded in bypass mode", "Load LoRA (Bypass)")
            continue
        node = _node(injections[0].inject)
        yield Reason(f"{node or key} puts itself into the network's layers", node)
    if getattr(patcher, "weight_wrapper_patches", None):
        functions = next(iter(patcher.weight_wrapper_patches.values()))
        node = _node(functions[0]) if functions else None
        yield Reason(f"{node or 'another pack'} changes weights while they are used", node)
    if getattr(patcher, "hook_patches", None) or getattr(patcher, "current_hooks", None):
        yield Reason("LoRAs on parts of the prompt change the weights in mid-run", "Hook LoRA")


# Patches.

_PARTS = {
    "emb_patch": "the timestep's embedding",
    "forward_timestep_embed_patch": "how blocks run",
    "input_block_patch": "the down blocks",
    "input_block_patch_after_skip": "the down blocks",
    "middle_block_after_patch": "the middle block",
    "middle_patch": "the transformer blocks",
    "output_block_patch": "the up blocks",
}


ATTENTION = "optimized_attention_override"
"""The key of `transformer_options` under which a node puts another attention."""

# Of ComfyUI's attentions those that compute the same, up to the order of additions.
_EXACT = ("flash", "pytorch", "split", "sub_quad", "xformers")


def exact_attention(override: Any) -> bool:
    """Whether it only chooses among ComfyUI's own exact attentions: an engine has its own."""
    if getattr(override, "__qualname__", "") != (
        "ModelPatcher.set_model_optimized_attention.<locals>.optimized_attention_override"
    ):
        return False
    cells = dict(zip(override.__code__.co_freevars, override.__closure__ or (), strict=False))
    chosen = cells["optimized_attention"].cell_contents
    registered = getattr(attention, "REGISTERED_ATTENTION_FUNCTIONS", {})
    return any(chosen is registered[name] for name in _EXACT if name in registered)


def _part(name: str) -> str:
    for prefix, part in (("attn1", "the self-attention"), ("attn2", "the cross-attention")):
        if name.startswith(prefix):
            return part
    return _PARTS.get(name, f"the network ({name})")


def _options(options: Mapping[str, Any]) -> Iterator[Reason]:
    """What is wrong with `transformer_options`."""
    for key, value in options.items():
        if key in HARMLESS_OPTIONS or value is None:
            continue
        if isinstance(value, (dict, list, tuple)) and not value:
            continue
        if key == "patches":
            for name, functions in value.items():
                yield from _patches(_part(name), functions)
        elif key == "patches_replace":
            for name, functions in value.items():
                yield from _patches(_part(name), list(functions.values()))
        elif key == ATTENTION:
            if exact_attention(value):
                continue
            node = _node(value)
            yield Reason(f"{node or 'a node'} has chosen another attention", node)
        else:
            yield Reason(f"a setting of another pack is not known: {key}")


def _patches(part: str, functions: Any) -> Iterator[Reason]:
    for function in functions:
        node = _node(function)
        yield Reason(f"{node or 'another pack'} changes {part}", node)


# The conditioning.


def _changed_conds(conds: Any) -> Iterator[Reason]:
    groups = conds.values() if isinstance(conds, Mapping) else conds or ()
    for cond in (cond for group in groups for cond in group or ()):
        # In ComfyUI's own nodes [tensor, options]; where samplers have it, options alone.
        given = cond if isinstance(cond, Mapping) else cond[1]
        if given.get("gligen") is not None:
            yield Reason("GLIGEN changes the transformer blocks", "GLIGENTextBoxApply")
        hooks = getattr(given.get("hooks"), "hooks", ())
        for hook in hooks:
            yield from _hook(hook)


def hooked(conds: Mapping[str, Any]) -> bool:
    """Whether conditioning, as samplers have it, comes with hooks."""
    return any(cond.get("hooks") is not None for given in conds.values() for cond in given or ())


def _hook(hook: Any) -> Iterator[Reason]:
    kind = getattr(getattr(hook, "hook_type", None), "value", None)
    if kind == "weight":
        yield Reason("LoRAs on parts of the prompt change the weights in mid-run", "Hook LoRA")
    elif kind == "transformer_options":
        yield from _options(getattr(hook, "transformers_dict", None) or {})
    elif kind != "add_models":
        node = _pack(type(hook))
        yield Reason(f"{node or 'a hook'} changes the network for parts of the prompt", node)


# Functions around the network.

# Names that a function needs to patch a network or to work on its layers itself.
_PATCHING = re.compile(
    r"(set_model_(options_patch|patch|attn|input_block|output_block|middle_block|emb_|forward_"
    r"|double_block|optimized_attention).*"
    r"|patches_replace|optimized_attention_override|attn[12](_output)?_(patch|replace)"
    r"|add_object_patch|set_injections)"
)
_INSIDE = re.compile(
    r"(diffusion_model(\..*)?|input_blocks|output_blocks|middle_block|transformer_blocks"
    r"|register_forward(_pre)?_hook)"
)
# Under which the host has a prompt's tensors in the conditioning.
_PROMPTS = frozenset(("c_crossattn", "cross_attn", "crossattn_controlnet", "model_conds"))
# Packages whose functions are not looked into: a name of theirs says enough.
_KNOWN = {
    *("builtins", "comfy", "comfy_api", "comfy_execution", "einops", "folder_paths", "math"),
    *("nodes", "numpy", "scipy", "torch", "torchvision", "tqdm"),
}
_MOST = 200  # functions looked into for one


class _Code:
    """What a function's code names, with that of every function it can be seen to call.

    layers: ids of the network and its layers, for those that the function holds.
    """

    def __init__(self, function: Any, layers: AbstractSet[int] = frozenset()) -> None:
        self.names: set[str] = set()
        self.strings: set[str] = set()
        self.codes: set[CodeType] = set()
        self._layers = layers
        self._holds_layer = False
        self._seen: set[int] = set()
        self._visit(function)

    def _visit(self, value: Any, owner: type | None = None) -> None:
        if id(value) in self._seen or len(self._seen) > _MOST:
            return
        self._seen.add(id(value))
        if isinstance(value, functools.partial):
            for part in (value.func, *value.args, *value.keywords.values()):
                self._see_layer(part)
                self._visit(part)
        elif isinstance(value, MethodType):
            self._visit(value.__func__, type(value.__self__))
            for part in (value.__self__, *getattr(value.__self__, "__dict__", {}).values()):
                self._see_layer(part)
        elif isinstance(value, FunctionType):
            self._function(value, owner)
        elif callable(value) and not isinstance(value, type):
            kind = type(value)
            if _package(kind) not in _KNOWN:
                self._visit(getattr(kind, "__call__", None), kind)  # noqa: B004
                for part in getattr(value, "__dict__", {}).values():
                    self._visit_part(part)

    def _see_layer(self, value: Any) -> None:
        owner = getattr(value, "__self__", None) if isinstance(value, MethodType) else value
        self._holds_layer = self._holds_layer or id(owner) in self._layers

    def _visit_part(self, value: Any) -> None:
        self._see_layer(value)
        self._visit_if_function(value)

    def _visit_if_function(self, value: Any) -> None:
        functions = (FunctionType, MethodType, functools.partial)
        if isinstance(value, functions) and _package(value) not in _KNOWN:
            self._visit(value)

    def _function(self, function: FunctionType, owner: type | None) -> None:
        named = self._code(function.__code__)
        for cell in function.__closure__ or ():
            try:
                self._visit_part(cell.cell_contents)
            except ValueError:  # not yet filled
                continue
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self._visit_part(value)
        for name in named:
            self._visit_if_function(function.__globals__.get(name))
            method = getattr(owner, name, None)
            if isinstance(method, FunctionType):
                self._visit(method, owner)

    def _code(self, code: CodeType) -> set[str]:
        named = set(code.co_names)
        self.codes.add(code)
        self.names |= named
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                named |= self._code(constant)
            elif isinstance(constant, str):
                self.strings.add(constant)
        return named

    @property
    def patches(self) -> bool:
        """Whether it gives the network patches."""
        named = any(_PATCHING.fullmatch(name) for name in self.names | self.strings)
        return named or "patches" in self.strings

    @property
    def inside(self) -> bool:
        """Whether it works on the network's layers itself."""
        named = any(_INSIDE.fullmatch(name) for name in self.names | self.strings)
        # As a name "forward" may be any module's; as a string it is about to be replaced.
        return named or self._holds_layer or "forward" in self.strings


_learned: set[CodeType] = set()


def _guidance(model_options: Mapping[str, Any]) -> Iterator[Any]:
    """Functions that are called with the network's results: of CFG, before it and after."""
    for key in ("sampler_cfg_function", "sampler_pre_cfg_function", "sampler_post_cfg_function"):
        value = model_options.get(key)
        yield from value if isinstance(value, (list, tuple)) else [value] if value else []


def _around(patcher: Any, model_options: Mapping[str, Any]) -> Iterator[Any]:
    """The other functions of others: wrappers, callbacks, whatever the sampler is told to call."""
    for key, value in model_options.items():
        if callable(value) and key != "sampler_cfg_function":
            yield value
    options = model_options.get("transformer_options") or {}
    for attribute in ("wrappers", "callbacks"):
        for place in (getattr(patcher, attribute, None), options.get(attribute)):
            for by_key in (place or {}).values():
                for functions in by_key.values():
                    yield from functions


def _is_ours(function: Any) -> bool:
    function = getattr(function, "__func__", function)
    origin = getattr(function, "__module__", None) or ""
    return origin.startswith(__name__.rpartition(".")[0] + ".")


def _foreign_functions(patcher: Any, model_options: Mapping[str, Any]) -> list[Any]:
    """Of those of `_guidance` and `_around` the ones that are not ours, each once."""
    found = chain(_guidance(model_options), _around(patcher, model_options))
    return list({id(each): each for each in found if not _is_ours(each)}.values())


def watched(patcher: Any, model_options: Mapping[str, Any], conds: Any) -> bool:
    """Whether code of others runs between the steps, and may reach into the network there."""
    return hooked(conds) or bool(_foreign_functions(patcher, model_options))


def prompts_named(patcher: Any, model_options: Mapping[str, Any]) -> bool:
    """Whether code of others knows where the prompts' tensors are, and may write into them.

    PyTorch counts no writes in inference mode, in which the host runs.
    """
    codes = map(_Code, _foreign_functions(patcher, model_options))
    return any(not _PROMPTS.isdisjoint(code.names | code.strings) for code in codes)


def _outer_reasons(patcher: Any, model_options: Mapping[str, Any]) -> Iterator[Reason]:
    functions = _foreign_functions(patcher, model_options)
    layers = set(map(id, patcher.model.diffusion_model.modules())) if functions else set()
    for function in functions:
        code = _Code(function, layers)
        learned = frozenset(code.codes & _learned)
        if code.patches or learned:
            node = _node(function)
            text = f"{node or 'another pack'} runs the network again with patches"
            yield Reason(text, node, frozenset() if code.patches else learned)
        elif code.inside:
            node = _node(function)
            yield Reason(f"{node or 'another pack'} works on the network's layers itself", node)


def learn(patcher: Any, model_options: Mapping[str, Any]) -> None:
    """Remember who sent this very call of the network with patches, for the runs to come.

    To be called where a call was refused for what others had put into it, and nowhere else. If a
    function of guidance is being executed, it sent the call. Wrappers are around every call, which
    says nothing, unless there is only one.
    """
    running: set[CodeType] = set()
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        running.add(frame.f_code)
        frame = frame.f_back
    for functions in (_guidance(model_options), _around(patcher, model_options)):
        found = [running & _own_codes(each) for each in functions if not _is_ours(each)]
        senders = {frozenset(codes) for codes in found if codes}
        if len(senders) == 1:
            _learned.update(*senders)
            return


def forget(learned: AbstractSet[CodeType]) -> None:
    """Take back what a run from its beginning to its end did not confirm."""
    _learned.difference_update(learned)


def _own_codes(function: Any) -> set[CodeType]:
    """Of the function itself, or of what a callable object calls: not of what these call."""
    if isinstance(function, functools.partial):
        return _own_codes(function.func)
    if isinstance(function, MethodType):
        return _own_codes(function.__func__)
    if isinstance(function, FunctionType):
        return {function.__code__}
    call = getattr(type(function), "__call__", None)  # noqa: B004
    return _own_codes(call) if isinstance(call, FunctionType) else set()


# Names.


def _package(value: Any) -> str:
    return (getattr(value, "__module__", None) or "").partition(".")[0]


def _source(value: Any) -> Any:
    """The function or class that a patch was written as."""
    if isinstance(value, functools.partial):
        return _source(value.func)
    value = getattr(value, "__func__", value)
    if isinstance(value, (FunctionType, type)):
        return value
    return type(value)


def _pack(value: Any) -> str | None:
    """The folder in custom_nodes where a function, class or object comes from."""
    source = _source(value)
    code = getattr(source, "__code__", None)
    path = code.co_filename if code is not None else ""
    if not path:
        path = getattr(sys.modules.get(source.__module__), "__file__", None) or ""
    found = re.search(r"[\\/]custom_nodes[\\/]([^\\/]+)", path)
    return found[1].removesuffix(".py") if found else None


def _node(value: Any) -> str | None:
    """The node that a patch comes from as the user knows it, else the pack's folder, else None."""
    if isinstance(value, (Tensor, str, int, float)) or value is None:
        return None
    source = _source(value)
    module = sys.modules.get(source.__module__)
    own = _nodes_of(module)
    outermost = source.__qualname__.partition(".")[0]
    if outermost in own:
        return own[outermost]
    pack = _pack(source)
    if pack is None and len(own) == 1:  # made by a helper of the module's only node
        return next(iter(own.values()))
    return pack


def _nodes_of(module: Any) -> dict[str, str]:
    """Display names of the nodes that a module defines, by the names of their classes."""
    found = {}
    shown = getattr(module, "NODE_DISPLAY_NAME_MAPPINGS", None) or {}
    for key, kind in (getattr(module, "NODE_CLASS_MAPPINGS", None) or {}).items():
        found[kind.__name__] = shown.get(key) or key
    registry = sys.modules.get("nodes")
    every = getattr(registry, "NODE_DISPLAY_NAME_MAPPINGS", None) or {}
    name = getattr(module, "__name__", None)
    for kind in list(vars(module).values()) if module is not None else ():
        if not isinstance(kind, type) or kind.__module__ != name or kind.__name__ in found:
            continue
        if hasattr(kind, "define_schema"):
            try:
                schema = kind.define_schema()
            except Exception:  # a class that only others build upon
                continue
            found[kind.__name__] = schema.display_name or schema.node_id
        elif hasattr(kind, "INPUT_TYPES"):
            found[kind.__name__] = every.get(kind.__name__) or kind.__name__
    return found
