"""The progress of a sweep, as its folders tell it, whichever processes and machines run its trials."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.sweep.trials import FAILED, Status, Trial, folder_of, status


class Progress:
    """Prints one line for every trial that has ended since the last look.

    Attributes:
      left: names of the trials that are not over, with their folders.

    Example:
      >>> from pathlib import Path
      >>> from experiments.sweep import Trial, folder_of, mark_failed
      >>> from experiments.sweep.progress import Progress
      >>> import tempfile
      >>> out, trials = Path(tempfile.mkdtemp()), [Trial("dpo", None, ""), Trial("ipo", None, "")]
      >>> progress = Progress(out, trials)
      >>> folder_of(out, trials[0]).mkdir(parents=True)
      >>> mark_failed(folder_of(out, trials[0]), "step 3: loss not finite")
      >>> progress.look()
      failed: dpo: step 3: loss not finite (0 done, 1 failed, 1 to go)
    """

    def __init__(self, out: Path, trials: Sequence[Trial[Any]]) -> None:
        """Take the trials as they stand.

        Args:
          out: the sweep's folder.
          trials: what is to be run.
        """
        self.left = {trial.name: folder_of(out, trial) for trial in trials}
        self._counts = {Status.DONE: 0, Status.FAILED: 0}

    def look(self) -> None:
        """Print what is new."""
        for name, folder in list(self.left.items()):
            now = status(folder)
            if now not in self._counts:
                continue
            del self.left[name]
            self._counts[now] += 1
            why = f": {json.loads((folder / FAILED).read_text())['reason']}" if now is Status.FAILED else ""
            counts = ", ".join(f"{count} {which.value}" for which, count in self._counts.items())
            print(f"{now.value}: {name}{why} ({counts}, {len(self.left)} to go)", flush=True)
