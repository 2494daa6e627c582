"""Slices of files -> parts, as a step of datatrove: on the processes of this machine, on Slurm, on Ray.

    LocalPipelineExecutor([EncodeParts(job, files, "file", None, work)], tasks=100).run()

The machines share the files and the work folder. Task `rank` of `n` makes the parts `rank`, `rank + n`, ...
that are not there; so a task that was killed is started again and goes on, and any number of tasks makes the
same parts. Invariant: the parts hold the documents that one machine would read, in the same order.
"""

from collections.abc import Iterator
from pathlib import Path

from datatrove.pipeline.base import PipelineStep

from firstwords.corpus import EncodeJob, Unit, WholeFile, group_units
from firstwords.parts import Work, make_part
from firstwords.sources import TextSlice, is_compressed, iter_text_slices


class EncodeParts(PipelineStep):
    """Encodes the units of some files that fall to a task.

    Args:
        job: encodes one.
        files: in order, on a disk that all machines see.
        split_docs, text_column: see `sources.read_texts`.
        work: where the parts go, on such a disk too.
    """

    name = "encode texts into parts of a token store"
    type = "firstwords"

    def __init__(
        self, job: EncodeJob, files: tuple[Path, ...], split_docs: str, text_column: str | None, work: Work
    ):
        super().__init__()
        self.job, self.files, self.work = job, files, work
        self.split_docs, self.text_column = split_docs, text_column

    def iter_units(self) -> Iterator[Unit]:
        """Yield all units; what is compressed is one as a whole, so that a task inflates only its own."""
        return group_units(self._iter_sources())

    def _iter_sources(self) -> Iterator[TextSlice | WholeFile]:
        for file in self.files:
            slices = None
            if not is_compressed(file):
                slices = iter_text_slices(file, self.split_docs, self.text_column)
            yield from slices or [WholeFile(str(file), self.split_docs, self.text_column)]

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> Iterator[None]:
        """Make the parts of task `rank`; passes no documents on."""
        for number, unit in enumerate(self.iter_units()):
            if number % world_size == rank:
                make_part(self.job, unit, self.work.part(number))
                self.stat_update("parts")
        yield from data or ()
