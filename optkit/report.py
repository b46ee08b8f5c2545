"""What a compilation found out: the manifest (the same for the same inputs) and the report (with its measurements)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from optkit.backends.base import Finished


class _Record(BaseModel):
    # JSON has no infinity, and the interval of a single sample is unbounded: "Infinity" reads back as what it was.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class ModelFacts(_Record):
    """The model as it was given.

    Attributes:
        sha256: Of the file; None for a graph that never was one.
        nodes: Without constants, bodies of control flow included.
        bytes: Of its weights.
    """

    name: str
    sha256: str | None
    nodes: int
    parameters: int
    bytes: int


class PassRecord(_Record):
    """One pass that ran."""

    name: str
    nodes_before: int
    nodes_after: int
    changes: int


class DataFacts(_Record):
    """Calibration data."""

    sha256: str
    batches: int
    random: bool


class Achieved(_Record):
    """Read back from what was built, by running it under the runtime's profiler.

    Attributes:
        formats: Share of the multiply-accumulates by the arithmetic that did them.
        placement: Share of the executed nodes by where they ran.
        operators: Executed nodes by the runtime's operator.
        weights: Bytes of weights by stored type.
        scheme: Signedness, granularity and zero point of what was quantized.
    """

    formats: dict[str, float]
    placement: dict[str, float]
    operators: dict[str, int]
    weights: dict[str, int]
    scheme: str


class AccuracyRecord(_Record):
    """The user's metric, reference against artifact on the same samples."""

    metric: str
    reference: float
    candidate: float
    drop: float
    ci95: tuple[float, float]
    n: int
    method: str
    budget: str | None
    met: Literal["met", "missed", "inconclusive"] | None
    needed: int | None
    constant: bool = False


class FidelityRecord(_Record):
    """Closeness to the fp32 reference's outputs; not an accuracy."""

    cosine: float
    sqnr_db: float
    top1_agreement: float | None
    batches: int
    inputs: Literal[
        "held-out calibration data",
        "calibration data",
        "inputs drawn from the input specification",
        "example inputs",
    ]
    met: bool


class Evidence(_Record):
    """What was really done, each its own statement; never one for another."""

    emitted: bool = False
    compiled: bool = False
    inspected: bool = False
    executed_cpu: bool = False
    proxy_compiled: bool = False
    ran_on_device: bool = False
    timed_on_device: bool = False


class SaturationRecord(_Record):
    """On a target whose u8 x s8 products saturate in 16 bits: what of the artifact does.

    Attributes:
        layers: Products of u8 activations with s8 weights.
        at_risk: Those with a pair of weights that saturates for some activations.
        narrowed: Those whose weights hold 7 bits, and in how many output channels (``3 of 64``), because they saturated on
            the calibration data.
    """

    layers: int
    at_risk: tuple[str, ...]
    narrowed: dict[str, str]


class LeftOutRecord(_Record):
    """A program that the device could have chosen, and what of its machine code kept it out of the artifact.

    Attributes:
        config: Number format, sizes, tile, warps and stages.
        gate: The condition that does not hold.
        found: What was found in its place.
    """

    kernel: str
    config: str
    gate: str
    found: str


class FileRecord(_Record):
    """A file of the artifact."""

    path: str
    bytes: int
    sha256: str


class Size(_Record):
    """Bytes of the model file or files."""

    before: int
    after: int


class Manifest(_Record):
    """What an artifact is. The same model, recipe, data and versions give the same bytes.

    Attributes:
        deferred: Steps that only the target itself can do, in words.
        mode: Of several ways to make what runs, the one that was taken: its name, and what it means.
        predicted: Where accuracy and fidelity were not taken from the target's own arithmetic: what gave its numbers instead.
        saturation: For targets that saturate.
        left_out: Programs that were compiled and are not shipped.
    """

    schema_: Literal[1] = Field(default=1, alias="schema")
    model: ModelFacts
    target: str
    backend: str
    options: dict[str, Any]
    recipe_digest: str
    passes: tuple[PassRecord, ...]
    data: DataFacts | None
    achieved: Achieved | None
    accuracy: AccuracyRecord | None
    fidelity: FidelityRecord | None
    size: Size
    evidence: Evidence
    deferred: tuple[str, ...] = ()
    mode: str | None = None
    predicted: str | None = None
    saturation: SaturationRecord | None = None
    left_out: tuple[LeftOutRecord, ...] = ()
    notes: tuple[str, ...]
    versions: dict[str, str]
    files: tuple[FileRecord, ...]

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Ceilings(_Record):
    """What the machine does at best, on one thread.

    Attributes:
        operations: Operations a second, two for each multiply-accumulate, by arithmetic: the fastest product of any runtime.
        sources: Whose product that was.
        bytes: Read a second of what fits into no cache.
        cached: The same of less, by its size in bytes: caches may hold it.
        stretched: Wall-clock over CPU time while this was measured.
        loaded: Whether that is so much that others were using the machine.
    """

    operations: dict[str, float]
    sources: dict[str, str]
    bytes: float
    cached: dict[int, float] = {}
    stretched: float
    loaded: bool

    def reading(self, size: float) -> float:
        """Bytes a second at which ``size`` bytes are read in each run."""
        return next((rate for held, rate in sorted(self.cached.items()) if size <= held), self.bytes)


class Roofline(_Record):
    """A latency against the ceilings.

    Attributes:
        floor_ms: What operations or bytes take at the ceiling, whichever is more.
        share: ``floor / latency``.
        bound: Which of the two it is.
    """

    floor_ms: float
    share: float
    bound: Literal["compute", "memory"]


class Latency(_Record):
    """Measured in turn with the reference: ONNX Runtime, fp32, default settings, the model as it was given."""

    reference_ms: float
    candidate_ms: float
    candidate_p99_ms: float
    wall_reference_ms: float
    wall_candidate_ms: float
    speedup: float
    ci95: tuple[float, float]
    runs: int
    threads: int
    loaded: bool
    inputs: str
    roofline: Roofline | None = None


class Tried(_Record):
    """One way to share the machine's cores, and what it gave: milliseconds of a run, or samples a second."""

    threads: int
    streams: int
    value: float


class ScenarioRecord(_Record):
    """How the artifact shares the cores of this machine, by wall-clock time.

    Attributes:
        scenario: MLPerf's name for what was measured, though for seconds and not for ten minutes: ``SingleStream``, one
            request at a time, by the 90th percentile of its latency in milliseconds; ``Offline``, by samples a second.
        threads: That the artifact uses, of all streams together.
        streams: Requests at the same time.
        candidate: Of the artifact.
        reference: Of ONNX Runtime fp32 as it comes, with a thread for each core and one request at a time.
        speedup: Median over rounds of the ratio within a round, above 1 where the artifact is better.
        fixed: Whether the caller's options fixed the threads, so that nothing was chosen.
        tried: What was measured to choose.
        loaded: Whether others used the machine.
    """

    scenario: Literal["SingleStream", "Offline"]
    threads: int
    streams: int
    candidate: float
    reference: float
    speedup: float
    ci95: tuple[float, float]
    fixed: bool
    tried: tuple[Tried, ...]
    loaded: bool


class EstimateRecord(_Record):
    """For a target that is not at hand: computed from its data sheet, never measured."""

    floor_ms: float
    low_ms: float
    high_ms: float
    bound: str
    inputs: str = ""


class CandidateRecord(_Record):
    """One thing that was tried.

    Attributes:
        verdict: ``shipped``, ``slower``, ``larger`` (where size decided), ``farther``, ``missed``, ``inconclusive``, ``not needed``,
            ``unavailable`` (a package or the processor lacks what it needs) or ``failed``.
    """

    name: str
    speedup: float | None
    bytes: int | None
    metric: float | None
    drop: float | None
    ci95: tuple[float, float] | None
    cosine: float | None
    verdict: str
    reason: str


class LayerRecord(_Record):
    """What quantizing one layer alone does to the outputs.

    ``bits`` are those of its weights, where the recipe had several to choose from and the layer is not in float.
    """

    node: str
    sqnr_db: float
    kept_float: bool
    bits: int | None = None


class EligibilityRecord(_Record):
    """Which units of the target may run an operation, best first: predicted from documented rules, not observed."""

    node: str
    op: str
    predicted: tuple[str, ...]
    reason: str = ""


class Resources(_Record):
    """What compiling cost: CPU with all processes that it started, memory of its own."""

    cpu_seconds: float
    wall_seconds: float
    peak_rss_bytes: int


class Report(_Record):
    """A manifest with the measurements behind it.

    Attributes:
        finished: What was done on the target, where ``compile`` found it at hand.
    """

    schema_: Literal[1] = Field(default=1, alias="schema")
    manifest: Manifest
    latency: Latency | None
    estimate: EstimateRecord | None = None
    finished: Finished | None = None
    goal: Literal["latency", "throughput", "size"] = "latency"
    scenario: ScenarioRecord | None = None
    candidates: tuple[CandidateRecord, ...]
    layers: tuple[LayerRecord, ...]
    eligibility: tuple[EligibilityRecord, ...] = ()
    pass_seconds: dict[str, float]
    operator_seconds: dict[str, float]
    missed: tuple[str, ...]
    inconclusive: tuple[str, ...]
    advice: tuple[str, ...]
    resources: Resources
    machine: dict[str, str]
    ceilings: Ceilings | None = None

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    @property
    def profiled(self) -> bool:
        """Whether formats and operators are from a profile: a device on which it was finished gave outputs and times alone."""
        return self.manifest.evidence.ran_on_device and self.finished is None

    @property
    def exit_code(self) -> int:
        """0, 3 where a limit was missed, 5 where only an undecided gate stands in the way (``--strict``)."""
        return 3 if self.missed else 5 if self.inconclusive else 0


def dump(record: Manifest | Report) -> str:
    """Stable JSON."""
    return record.model_dump_json(by_alias=True, indent=2) + "\n"
