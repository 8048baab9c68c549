"""What the pack's Python says to a user, read from its source.

The front end translates these texts by templates (`web/js/said.js`). Here they are taken out of the
code as such: `{}` stands for what is known at run time alone, each choice between two words is
written out, and texts are split as the front end splits them.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from itertools import product
from pathlib import Path

ACCEL = Path(__file__).parents[2] / "accel"

HOST = sorted((ACCEL / "hosts" / "comfyui").glob("*.py"))
"""Files all of whose texts are looked at."""

OTHERS = (
    *("bench", "cli", "demo", "hosts", "lora", "__main__.py", "cache.py", "session.py"),
    *("tuning/profile_file.py", "tuning/tune.py"),
)
"""What a user of the host never meets, below `accel`: folders and files."""

BELOW = sorted(
    path
    for path in ACCEL.rglob("*.py")
    if not {path.relative_to(ACCEL).parts[0], path.relative_to(ACCEL).as_posix()} & {*OTHERS}
)
"""Files whose errors, reasons and progress reach the host's user, and nothing else of them."""

TELLING = {"status_line", "_line_of", "_run_lines", "_memory_lines", "why_no_plan"}
"""Functions of which single words are texts, too."""

FAULTS = {
    *("AttributeError", "ModuleNotFoundError", "NotImplementedError", "OSError", "RuntimeError"),
    *("InvalidPlan", "TypeError", "ValueError"),
}
"""Errors whose texts are for programmers: a user can only report them."""

LOGS = {"debug", "info", "warning", "error", "_say"}
PROGRESS = {"progress", "_tell"}

_Function = ast.FunctionDef | ast.AsyncFunctionDef


def split(text: str) -> list[str]:
    """The parts of a text or a template that the front end looks up one by one."""
    parts = [part for line in text.split("\n") for part in line.split(" · ")]
    # The node behind a reason.
    return [part.removesuffix(" ({})") if part.endswith("{} ({})") else part for part in parts]


class Texts:
    """The templates of one file.

    shown: those that a user may read, with the line where each stands. all: every text there is.
    """

    def __init__(self, path: Path, whole: bool) -> None:
        self.shown: dict[str, str] = {}
        self.all: set[str] = set()
        self._path, self._whole = path, whole
        tree = ast.parse(path.read_text("utf-8"))
        self._parents = {
            child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)
        }
        self._inlined: set[ast.AST] = set()
        texts = [node for node in ast.walk(tree) if self._is_text(node)]
        found = [(node, list(self._expand(node))) for node in texts]
        for node, templates in found:
            if node not in self._inlined:
                for part in (part for template in templates for part in split(template)):
                    self.all.add(part)
                    if self._is_shown(node) and self._is_read(node, part):
                        self.shown[part] = f"{path.name}:{node.lineno}"

    def _above(self, node: ast.AST) -> Iterator[ast.AST]:
        while node in self._parents:
            node = self._parents[node]
            yield node

    def _is_text(self, node: ast.AST) -> bool:
        """Whether it is a whole text: no piece of an f-string or a sum, no key, no docstring."""
        if not self._makes_text(node):
            return False
        parent = self._parents[node]
        if isinstance(parent, (ast.Expr, ast.JoinedStr, ast.Subscript, ast.Compare)):
            return False
        if isinstance(parent, ast.FormattedValue) and parent.format_spec is node:
            return False
        if isinstance(parent, ast.Dict) and node in parent.keys:
            return False
        child = node
        for parent in self._above(node):
            if self._makes_text(parent) and isinstance(parent, ast.BinOp):
                return False
            if isinstance(parent, ast.IfExp) and child is not parent.test:
                child = parent  # a choice is written out where it stands in a text
                continue
            return not (isinstance(child, ast.IfExp) and isinstance(parent, ast.FormattedValue))
        return True

    def _makes_text(self, node: ast.AST) -> bool:
        if isinstance(node, ast.BinOp):
            sides = (node.left, node.right)
            return isinstance(node.op, ast.Add) and any(map(self._makes_text, sides))
        if isinstance(node, ast.Call):
            return _counted(node) is not None
        constant = isinstance(node, ast.Constant) and isinstance(node.value, str)
        return constant or isinstance(node, ast.JoinedStr)

    def _expand(self, node: ast.AST) -> Iterator[str]:
        """The templates of an expression."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            for pieces in product(*(list(self._expand(piece)) for piece in node.values)):
                yield "".join(pieces)
        elif isinstance(node, ast.FormattedValue):
            yield from self._expand(node.value)
        elif isinstance(node, ast.IfExp):
            yield from self._expand(node.body)
            yield from self._expand(node.orelse)
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            for left in list(self._expand(node.left)):
                yield from (left + right for right in self._expand(node.right))
        elif isinstance(node, ast.Call) and (word := _counted(node)) is not None:
            self._inlined.add(word)
            yield from (f"{{}} {word.value}", f"{{}} {word.value}s")
        elif isinstance(node, ast.Name) and (value := self._only_value(node)) is not None:
            self._inlined |= set(self._pieces(value))
            yield from self._expand(value)
        else:
            yield "{}"

    def _pieces(self, node: ast.AST) -> Iterator[ast.AST]:
        """Of what a template is made of, without what is known at run time alone."""
        yield node
        if isinstance(node, ast.JoinedStr):
            inside: list[ast.AST] = list(node.values)
        elif isinstance(node, ast.FormattedValue):
            inside = [node.value] if self._makes_text(node.value) else []
        elif isinstance(node, ast.IfExp):
            inside = [node.body, node.orelse]
        else:
            inside = []
        for piece in inside:
            yield from self._pieces(piece)

    def _only_value(self, name: ast.Name) -> ast.AST | None:
        """What a variable of the function is, where it is one text or a choice of two."""
        function = self._function(name)
        if function is None:
            return None
        inside = list(ast.walk(function))
        values = [
            node.value
            for node in inside
            if isinstance(node, ast.Assign)
            and any(isinstance(one, ast.Name) and one.id == name.id for one in node.targets)
        ]
        stores = [
            node
            for node in inside
            if isinstance(node, ast.Name) and node.id == name.id and isinstance(node.ctx, ast.Store)
        ]
        if len(values) != 1 or len(stores) != 1:
            return None
        (value,) = values
        choices = [value.body, value.orelse] if isinstance(value, ast.IfExp) else [value]
        return value if all(map(self._makes_text, choices)) else None

    def _function(self, node: ast.AST) -> _Function | None:
        return next((one for one in self._above(node) if isinstance(one, _Function)), None)

    def _is_shown(self, node: ast.AST) -> bool:
        """Whether a user gets it, by what the code does with it."""
        calls = {_name(call) for call in self._above(node) if isinstance(call, ast.Call)}
        function = self._function(node)
        if calls & (LOGS | FAULTS) or (function is not None and function.name == "_count"):
            return False
        if self._whole or calls & PROGRESS:
            return True
        above = list(self._above(node))
        if any(isinstance(one, ast.Raise) for one in above):
            return True
        if function is None or function.returns is None:
            return False
        if "UnsupportedModel" in calls:  # a function that makes the error
            return True
        reason = ast.unparse(function.returns) == "str | None"
        return reason and any(isinstance(one, (ast.Return, ast.Assign)) for one in above)

    def _is_read(self, node: ast.AST, part: str) -> bool:
        """Whether it is in words: two, or one with something put in, or one that stands alone."""
        if not any(map(str.isalpha, part.replace("{}", ""))):
            return False
        parent, function = self._parents[node], self._function(node)
        progress = isinstance(parent, ast.Dict) and any(
            value is node and isinstance(key, ast.Constant) and key.value == "text"
            for key, value in zip(parent.keys, parent.values, strict=True)
        )
        calls = {_name(call) for call in self._above(node) if isinstance(call, ast.Call)}
        told = function is not None and function.name in TELLING
        return " " in part.strip() or told or progress or bool(calls & PROGRESS)


def _name(call: ast.Call) -> str:
    return str(getattr(call.func, "attr", getattr(call.func, "id", "")))


def _counted(call: ast.Call) -> ast.Constant | None:
    """The word of `_count(2, "LoRA")`, which makes "2 LoRAs"."""
    word = call.args[1] if _name(call) == "_count" and len(call.args) == 2 else None
    return word if isinstance(word, ast.Constant) else None


def collect() -> list[Texts]:
    """Of all files."""
    return [Texts(path, True) for path in HOST] + [Texts(path, False) for path in BELOW]
