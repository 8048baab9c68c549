"""What a run of `tune` learns on the way: the performance model's constants, and what cannot win.

For a fixed structure only the rows of a call change with the image. So of each kind of call one is
timed in full, the one in the middle of its sizes. That calibrates the model, which then names the
few candidates of the others that are worth timing; these correct it in turn.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from ..kernels.registry import Call, Config, Kernel
from .chips import Chip
from .cost import Fit, Model, Times, fit
from .profile import family_of

KEEP = 4
"""Candidates of a call that are timed, beside the best of each kernel that may win: on the recorded
times of an H100 and an H200 the best of these is 1 % slower than the best of all
(`benchmarks.pruning`)."""

ENOUGH = 50
"""Calls from whose times constants are fitted that a profile keeps."""


class Calibration:
    """The model of one chip, as far as it was timed.

    known: times of earlier runs, by the keys of calls. keep: how many candidates are timed of a
    call whose kind was timed already; None: all.
    """

    def __init__(
        self, chip: Chip, known: Mapping[str, Times] | None = None, keep: int | None = KEEP
    ) -> None:
        self._chip, self._keep = chip, keep
        self._times = dict(known or {})
        self._model: Model | None = None
        self._worth: dict[str, Sequence[tuple[Kernel, Config]]] = {}

    def in_full(self, calls: Iterable[Call]) -> list[Call]:
        """Those of which all candidates are to be timed, ahead of the others."""
        if self._keep is None:
            return list(calls)
        kinds: dict[str, list[tuple[int, Call]]] = defaultdict(list)
        for call in calls:
            kind, rows = family_of(call.key)
            kinds[kind].append((rows, call))
        known = {family_of(key)[0] for key in self._times}
        return [
            sorted(members, key=lambda member: member[0])[len(members) // 2][1]
            for kind, members in kinds.items()
            if kind not in known
        ]

    def worth_timing(
        self, call: Call, candidates: Sequence[tuple[Kernel, Config]]
    ) -> Sequence[tuple[Kernel, Config]]:
        """Of a call's candidates those that may win, in the same order; asked again, the same."""
        if self._keep is None:
            return candidates
        if call.key not in self._worth:
            if self._model is None:
                self._model = Model(self._chip, fit(self._chip, self._times), self._times)
            self._worth[call.key] = self._model.prune(call, candidates, self._keep)
        return self._worth[call.key]

    def learn(self, key: str, times: Times) -> None:
        """The times of a call's candidates."""
        self._times[key] = times
        if self._model is not None:
            self._model.add({key: times})

    def fitted(self) -> Fit | None:
        """Constants from all that is known; None if that is too little."""
        if len(self._times) < ENOUGH:
            return None
        found = fit(self._chip, self._times)
        return found if found.constants else None
