"""Configuration: what a run can be told. `luffy.config_file` reads one.

One class per section; every field says what it means and its unit. A run is described completely by a `Config`: the
resolved one is written into the run folder, and `luffy train THAT_FILE` repeats the run. This module imports neither
torch nor transformers nor vllm.
"""

from functools import cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PositiveInt, create_model, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from luffy.objectives import find, options_of
from luffy.objectives.luffy import Luffy
from luffy.sections import Beta, Fraction, NonNegative, Positive, Section


class LoraConfig(Section):
    """Train small adapters beside frozen weights (arXiv 2106.09685). Needs the `lora` extra."""

    rank: PositiveInt | None = None
    """Rank of the adapters; null: train all weights. Adapters want a higher optim.lr, 1e-5 to 1e-4."""
    alpha: Positive = 32.0
    """What an adapter says is multiplied by alpha / rank."""
    targets: Annotated[list[Annotated[str, Field(pattern=r"^\w+$")]], Field(min_length=1)] | None = None
    """Names of the layers that get one, such as ["q_proj"]; null: every linear layer of the blocks. Never the head."""


class ModelConfig(Section):
    name: str = "embedded:smollm2-135m-instruct"
    """Local folder, Hugging Face id, or `embedded:smollm2-135m-instruct` (needs no hub)."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Compute type of the trainer and of the rollout engine; `auto`: bfloat16 where the machine multiplies it (a GPU, a
    CPU with AVX-512), else float32. Master weights and reductions are always float32."""
    prompt_style: Literal["chat", "luffy", "plain"] = "chat"
    """`chat`: the tokenizer's template; `luffy`: the paper's plain-text template; `plain`: the user's text alone."""
    system: str | None = None
    """System turn put before every prompt; null keeps what the data says, "" removes it."""
    chat_template: str | None = None
    """A Jinja template that replaces the tokenizer's own; other prompt styles do not use it."""
    eos_token: str | None = None
    """The token that ends an answer; null: the tokenizer's EOS. Base models whose chat template closes a turn with
    another token need it (Qwen2.5: <|im_end|>)."""
    lora: LoraConfig = LoraConfig()
    gradient_checkpointing: bool | Literal["selective"] = False
    """Recompute each block in the backward pass: less memory, about a third more time. `selective` keeps the products
    and recomputes what lies between them: about half the memory, little time."""
    offload_activations: bool = False
    """Keep what gradient checkpointing saves, the input of every block, in host memory."""
    mlp_tokens: PositiveInt | None = None
    """Run each MLP on so many tokens at a time and again in the backward pass; null: all of a micro-batch at once."""
    body_kernels: Literal["torch", "liger"] = "torch"
    """`liger`: Liger's Triton kernels for norms, rotations and gated MLPs. Needs a GPU and the `liger` extra."""
    reference_on_cpu: bool = False
    """Keep the frozen reference policy, of an objective that has one (`kl_coef`), in host memory between its uses."""
    trust_remote_code: bool = False
    """Run code that comes with a model. Off unless you ask for it."""


class ProblemsConfig(Section):
    """Generated problems (`luffy.problems`), used when `data.path` is null."""

    families: dict[str, dict[str, int | list[int]]] = {"digit_sum": {}}
    """Family name -> its difficulty knobs, each a number or a [low, high] range; {} takes the family's defaults."""
    train: PositiveInt = 2000
    """Number of training problems."""
    heldout: PositiveInt = 256
    """Number of held-out problems, never trained on."""
    ood: PositiveInt = 128
    """Number of out-of-distribution problems: harder than any in training."""
    seed: int = 0
    """Of the problems and their traces; another seed makes others."""
    wrong: Fraction = 0.0
    """Fraction of traces whose reasoning goes wrong and whose final answer is therefore wrong."""
    missing: Fraction = 0.0
    """Fraction of problems without a trace."""
    verbose: Fraction = 0.0
    """Fraction of traces told at length."""
    teachers: list[str] = ["terse"]
    """Styles mixed at random; `python -m luffy.problems --help` lists them."""
    traces: PositiveInt = 1
    """Traces of a training problem, each of another teacher."""
    suffix: str = " Put the answer in \\boxed{}."
    """Added to every question."""
    think: bool = False
    """Traces put their steps between think tags, as the `train` grader demands."""


class DataConfig(Section):
    path: str | None = None
    """Parquet / JSONL file, folder or Hugging Face dataset id with the training problems; null: generated ones."""
    split: str | None = None
    """Split of a folder, file or dataset id; null: the only one there is, of a dataset id its `train`."""
    problems: ProblemsConfig = ProblemsConfig()
    limit: PositiveInt | None = None
    """Use only the first so many problems."""
    max_prompt_tokens: PositiveInt = 1024
    """Longer prompts are skipped and counted."""
    max_trace_tokens: PositiveInt = 8192
    """Longer traces are dropped and counted, never truncated."""


class RolloutConfig(Section):
    engine: Literal["colocated", "server", "replay"] = "colocated"
    """`colocated`: vLLM in the trainer's process; `server`: vLLM's servers, started by the run or named in `urls`;
    `replay`: what another run has sampled."""
    record: bool = False
    """Keep everything that is sampled in the run folder's `rollouts/`."""
    replay: str | None = None
    """Folder of recorded rollouts for `engine = "replay"`: `rollouts/` of a run with the same data and seed."""
    servers: PositiveInt = 1
    """Servers that the run starts on this machine."""
    devices: list[str] = []
    """Of each of these servers, its CUDA_VISIBLE_DEVICES, such as ["6", "7"]; []: all see the same."""
    tensor_parallel: PositiveInt = 1
    """GPUs that share a model: a server's, or consecutive ranks' with `engine = "colocated"`."""
    urls: list[str] = []
    """Addresses of servers that run already (python -m luffy.rollout.serve) and see the run folder, such as
    ["http://10.0.0.7:8001"]. Their key is LUFFY_API_KEY in the environment."""
    max_staleness: Annotated[int, Field(ge=0)] = 0
    """Batches that may be sampled ahead of the update, and so steps that lie between the weights that sample and those
    that learn; 0: strictly on-policy. Needs `engine = "server"`; see `correction` for what it does to the gradient."""
    oversample: Annotated[float, Field(ge=1, le=8)] = 1.0
    """Prompts to begin, as a multiple of those that a step needs. Sampling ends when enough are done; the others go on
    in the next step, with its weights. So even with `max_staleness` 0 some tokens are of older weights: see
    `correction`."""
    refill: Annotated[int, Field(ge=0)] = 0
    """Rounds of further prompts in place of those whose rows all have the same reward, and so no gradient (dynamic
    sampling); 0: such prompts stay in the batch."""
    transport: Literal["files", "broadcast"] = "files"
    """How weights reach servers: `files` in the run folder, or `broadcast` into their memory (NCCL on GPUs, gloo on
    CPUs), with files where that fails."""
    sleep: bool = False
    """With `engine = "colocated"` on GPUs: while the trainer works vLLM gives up its memory, weights and all, and while
    vLLM samples the optimizer's moments are on the host."""
    address: str = "127.0.0.1"
    """Of the trainer's machine, where servers on others join a broadcast."""
    probe_s: Positive = 120.0
    """A server whose engine says nothing for so long hangs, and is started again."""
    server_wait_s: Positive = 1800.0
    """Seconds without an answer of any server after which the run ends."""
    temperature: Positive = 1.0
    """Sampling temperature; the trainer's log-probs use the same. Sampling is never truncated (top-p 1, top-k off)."""
    max_tokens: PositiveInt = 8192
    """Longest answer, tokens."""
    memory_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """Share of the GPU's memory that vLLM may use."""
    kv_cache_gib: Positive | None = None
    """Size of vLLM's KV cache, GiB; null: what `memory_fraction` leaves on a GPU, 1 on a CPU."""
    max_sequences: PositiveInt = 256
    """Most sequences that vLLM decodes at a time."""
    eager: bool = True
    """Run vLLM without graph capture: starts faster, decodes slower on a GPU."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Type of the engine's weights; null: `model.dtype`."""


class RewardConfig(Section):
    grader: str = "train"
    """`train`: math-verify on what follows </think> (LUFFY's); `answer`: the same on the whole text; `boxed`: the last
    box, by the strict grader of evaluations; `deepscaler`, `deepscaler_v0`, `deepscaler_v1`: LUFFY's earlier rewards;
    `number`: the last number is the answer; `choice`: the letter of an option; `exact` and `regex`: the final answer as
    text; `code`: a program that passes the problem's tests; `gym`: reasoning-gym's verifier of the task;
    `module:function`, or one that an installed package brings (entry point `luffy.graders`): yours."""
    workers: PositiveInt = 2
    """Verifier processes."""
    timeout_s: Positive = 5.0
    """Wall-clock limit of one answer, seconds; a verifier over it is killed and the answer counted."""


# (low, high) of each kind of correction; docs/correction.md says where they were published.
CORRECTION_BOUNDS = {
    "none": (0.0, float("inf")),
    "truncate": (0.0, 2.0),
    "mask": (0.5, 5.0),
    "sequence_mask": (0.999, 1.001),
}


class CorrectionConfig(Section):
    """What is done about rollouts that the trainer itself would have drawn with other probabilities: because the engine
    computes differently, or had older weights. The ratio of a token is trainer over sampler; see docs/correction.md."""

    kind: Literal["none", "truncate", "mask", "sequence_mask"] = "none"
    """`truncate`: a token weighs its ratio, at most `high`; `mask`: its ratio, 0 outside [low, high] (IcePop);
    `sequence_mask`: rows whose ratios' geometric mean is outside weigh 0. With one update a step all but `none` cost
    another forward pass."""
    low: Positive | None = None
    """Smallest ratio that counts; null: 0.5 for `mask`, 0.999 for `sequence_mask`. `truncate` has none."""
    high: Positive | None = None
    """Largest one; null: 2 for `truncate`, 5 for `mask`, 1.001 for `sequence_mask`."""

    @property
    def bounds(self) -> tuple[float, float]:
        """(low, high), with what the kind says where they are null."""
        low, high = CORRECTION_BOUNDS[self.kind]
        return low if self.low is None else self.low, high if self.high is None else self.high


class OptimConfig(Section):
    lr: Positive = 1e-6
    """Learning rate of AdamW, the highest: after the warm-up and before the schedule lowers it."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """AdamW's: what its moving means of the gradient and of its square keep at an update, as shares."""
    weight_decay: NonNegative = 0.01
    """AdamW's: an update shrinks every weight by this share of it, times the learning rate."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Updates over which the learning rate rises linearly from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What follows the warm-up, down to 0 at the last update of `train.steps`; a time limit may come first."""
    on_cpu: bool = False
    """Keep master weights and Adam's moments in host memory and update them there: frees 12 bytes a parameter."""
    max_grad_norm: Positive = 1.0
    """A gradient that is longer, in the norm of all weights together, is scaled down to it."""
    max_bad_steps: PositiveInt = 3
    """Updates with a non-finite loss or gradient are skipped; after so many in a row the run stops with a dump."""


class TrainConfig(Section):
    steps: PositiveInt = 500
    """Batches of prompts to train on."""
    max_minutes: Positive | None = None
    """Stop after so many minutes of training (evaluation not counted), whatever `steps` says."""
    prompts_per_step: PositiveInt = 128
    """Problems of a step's batch, a group of rows for each; a multiple of `train.updates_per_step`."""
    updates_per_step: PositiveInt = 1
    """Optimizer updates that one batch of rollouts is split into."""
    tokens_per_micro: PositiveInt = 32768
    """Token budget of a micro-batch; sequences are packed, nothing is padded."""
    seed: int = 0
    """Of the order of problems, and of all that is sampled or drawn."""
    hang_minutes: NonNegative = 240.0
    """A phase of a step that takes longer ends the run, with the ranks that are behind named; 0: never."""


class MeshConfig(Section):
    """How ranks share the work; what neither number takes up shards the model (FSDP2)."""

    replicate: PositiveInt = 1
    """Copies of the sharded model (HSDP): shard inside a machine, replicate across."""
    sequence: PositiveInt = 1
    """Ranks that share the tokens of a micro-batch (Ulysses), for sequences too long for one; divides the heads."""


class EvalConfig(Section):
    path: str | None = None
    """Problems to evaluate on; null: the generated held-out split."""
    split: str | None = None
    """As `data.split`."""
    limit: PositiveInt | None = None
    """Evaluate before and after training on the first so many problems; null: all."""
    validation: str | None = None
    """Problems for the evaluations during training, by which the best checkpoint is chosen and kept; none of them may
    be among those of `eval.path`. Null: the first evaluated set, and no best checkpoint."""
    overlap: Literal["refuse", "warn"] = "refuse"
    """What is done where a training problem is also one that the run is judged by (the same question, less spaces and
    case): `refuse` to train, or `warn` and go on."""
    every: Annotated[int, Field(ge=0)] = 10
    """Steps between evaluations during training; 0: only before and after."""
    every_limit: PositiveInt | None = None
    """Problems used by the evaluations during training; null: all."""
    temperature: NonNegative = 0.0
    """0 is greedy."""
    max_tokens: PositiveInt | None = None
    """Longest answer; null: `rollout.max_tokens`."""
    token_groups: Annotated[int, Field(ge=0)] = 2
    """Groups whose tokens are looked at one by one at every evaluation, for `luffy report`; 0: none."""


class CheckpointConfig(Section):
    every: Annotated[int, Field(ge=0)] = 50
    """Steps between checkpoints; 0: only at the end."""
    keep: PositiveInt = 2
    """Newest checkpoints to keep, one of them to fall back to; with `eval.validation` the best one stays too."""


class LogConfig(Section):
    """Where metrics go besides metrics.jsonl; see docs/metrics.md."""

    to: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = ["tensorboard"]
    """Loggers; each writes into the run folder. All but TensorBoard need the extra of their name."""
    online: list[Literal["wandb", "mlflow", "trackio"]] = []
    """Those of them that send to where the environment says (WANDB_*, MLFLOW_TRACKING_URI, TRACKIO_SPACE_ID, ...)
    instead. Of the others nothing leaves the machine, whatever the environment says."""
    project: Annotated[str, Field(pattern=r"^[\w.-]+$")] = "luffy"
    """What the loggers call the runs that belong together; the run's own name is `name`."""


class Config(BaseSettings):
    model_config = SettingsConfigDict(extra="forbid", use_attribute_docstrings=True)

    name: str = "run"
    """Name of the run; the default run folder is runs/NAME."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    objective: Luffy.Options = Luffy.Options()
    """LUFFY's, unless the class comes of `config_of`."""
    correction: CorrectionConfig = CorrectionConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        if self.train.prompts_per_step % self.train.updates_per_step:
            raise ValueError(
                f"train.prompts_per_step must be a multiple of train.updates_per_step, got "
                f"{self.train.prompts_per_step} and {self.train.updates_per_step}"
            )
        if self.model.offload_activations and self.model.gradient_checkpointing is not True:
            raise ValueError("model.offload_activations needs model.gradient_checkpointing = true")
        rollout = self.rollout
        if rollout.devices and len(rollout.devices) != rollout.servers:
            raise ValueError(
                f"rollout.devices must name those of all {rollout.servers} rollout.servers, got {len(rollout.devices)}"
            )
        if rollout.max_staleness and rollout.engine != "server":
            raise ValueError('rollout.max_staleness needs rollout.engine = "server": one process samples or trains')
        if (rollout.engine == "replay") != (rollout.replay is not None):
            raise ValueError('rollout.engine = "replay" and rollout.replay, the folder, need each other')
        by_need = (("oversample", rollout.oversample > 1), ("refill", rollout.refill > 0))
        sampled_by_need = [name for name, is_so in by_need if is_so]
        if rollout.oversample > 1 and rollout.record:
            raise ValueError("rollout.record keeps whole answers, and rollout.oversample samples them in parts")
        if sampled_by_need and (rollout.engine == "replay" or not self.objective.sampled):
            raise ValueError(f"rollout.{sampled_by_need[0]} needs an objective and an engine that sample")
        if find(self.objective.name).recalls and (sampled_by_need or rollout.max_staleness):
            name = sampled_by_need[0] if sampled_by_need else "max_staleness"
            raise ValueError(f"rollout.{name} does not go with {self.objective.name}, which chooses a step's prompts")
        if rollout.engine != "server" and (rollout.urls or rollout.transport != "files"):
            raise ValueError('rollout.urls and rollout.transport need rollout.engine = "server"')
        if rollout.engine != "colocated" and rollout.sleep:
            raise ValueError('rollout.sleep needs rollout.engine = "colocated": a server has its memory to itself')
        if rollout.engine == "colocated" and rollout.tensor_parallel > 1 and sampled_by_need:
            raise ValueError(
                f"rollout.{sampled_by_need[0]} needs engines of which each can stop: tensor_parallel 1, or servers"
            )
        if find(self.objective.name).corrects and self.correction.kind != "none":
            raise ValueError(
                f'correction.kind must be "none" with {self.objective.name}, which itself weighs by the same ratio, '
                f'got "{self.correction.kind}"'
            )
        if stray := sorted(set(self.log.online) - set(self.log.to)):
            raise ValueError(f"log.online must be among log.to, got {', '.join(stray)}")
        low, high = self.correction.bounds
        if not low < high:
            raise ValueError(f"correction.low must be below correction.high, got {low} and {high}")
        if self.correction.kind == "truncate" and self.correction.low is not None:
            raise ValueError('correction.low means nothing with correction.kind = "truncate"; leave it out')
        return self

    @property
    def first_pass(self) -> bool:
        """Whether a step computes the log-probs of all its rows before its first update."""
        looks = find(self.objective.name).looks != "nothing"
        several = self.train.updates_per_step > 1
        return several or self.correction.kind != "none" or looks or self.objective.compares

    @classmethod
    def settings_customise_sources(cls, settings_cls, init_settings, **_):  # type: ignore[override]
        return (init_settings,)  # neither the environment nor .env files configure a run


@cache
def config_of(objective: str) -> type[Config]:
    """The configuration of runs with this objective, whose options are its own.

    Raises:
        ValueError: there is no such objective.
    """
    options = options_of(objective)
    return create_model("Config", __base__=Config, objective=(options, options.model_validate({})))


def flat_keys(model: type[BaseModel] = Config, prefix: str = "") -> dict[str, Any]:
    """Every `section.key` with its pydantic field, in order."""
    keys: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys |= flat_keys(field.annotation, f"{prefix}{name}.")
        else:
            keys[prefix + name] = field
    return keys
