"""Arms the product's fault points and waits until a process is held there."""

from __future__ import annotations

from pathlib import Path

from program import wait_until

from trainables.fault_points import VARIABLE


class FaultPoints:
    """The armed points of one study."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._given_up = False
        folder.mkdir()

    @property
    def env(self) -> dict[str, str]:
        """What the program is started with."""
        return {VARIABLE: str(self._folder)}

    def arm(self, point: str) -> None:
        (self._folder / point).touch()

    def reached(self, point: str, timeout_s: float = 180.0) -> int:
        """The process that is held at the point, as soon as one is."""
        path = self._folder / f"{point}.reached"
        wait_until(lambda: path.exists() or self._given_up, timeout_s, f"a process at {point}")
        assert not self._given_up, "another cell has failed"
        return int(path.read_text())

    def give_up(self) -> None:
        """Ends all waiting in `reached`."""
        self._given_up = True

    def release(self, point: str) -> None:
        (self._folder / f"{point}.go").touch()
