"""What calls will take on a GPU, which need not be here: by its profile, or the performance model.

Where a selector chooses what can run, and proves it, this one looks nothing but times up. So it can
be asked ahead of a run, and of another GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from .. import kernels
from ..hardware import Hardware
from ..kernels.registry import Call, Config, Kernel, reference
from .profile import Profile
from .select import Choice, model_of

logger = logging.getLogger(__name__)

MEASURED, PREDICTED, UNKNOWN = "measured", "predicted", "unknown"


class Forecast:
    """Stands where a selector does: choices with the times that are to be expected.

    The reason of a choice is `MEASURED`, `PREDICTED` or `UNKNOWN`; that has no time.
    """

    def __init__(self, hardware: Hardware, profile: Profile) -> None:
        self._hardware, self._profile = hardware, profile
        self._model = model_of(hardware, profile)
        kernels.load_triton()
        self._registered = {kernel.name: kernel for kernel in kernels.kernels()}
        self._choices: dict[str, Choice] = {}

    def select(self, calls: Sequence[Call]) -> list[Choice]:
        """A choice for each call; none of them need be one that can run."""
        for call in calls:
            if call.key not in self._choices:
                self._choices[call.key] = self._choice(call)
        return [self._choices[call.key] for call in calls]

    def _choice(self, call: Call) -> Choice:
        entry = self._profile.get(call.key)
        known = None if entry is None else self._registered.get(entry.kernel)
        if entry is not None and known is not None and entry.elsewhere is None:
            return Choice(_unbound(known), entry.config, MEASURED, us=entry.us)
        if self._model is not None:
            pairs: list[tuple[Kernel, Config]] = kernels.candidates(call, self._hardware)[:-1]
            near = self._profile.near(call.key)
            if near is not None and near[1].kernel in self._registered:
                pairs.append((self._registered[near[1].kernel], near[1].config))
            for found in self._model.rank(call, pairs)[:1]:
                if found.us is not None:
                    return Choice(_unbound(found.kernel), found.config, PREDICTED, about=found.us)
        return Choice(reference(call.op), {}, UNKNOWN)


def _unbound(kernel: Kernel) -> Kernel:
    """The kernel without what only its GPU can say: the scratch memory of a library's plan."""

    def workspace(call: Call, config: Config) -> int:
        try:
            return kernel.workspace(call, config)
        except Exception as error:
            logger.debug("the scratch memory of %s is not known here: %s", kernel.name, error)
            return 0

    return replace(kernel, workspace=workspace)
