"""Memory of one rank, by part, at every moment of an update at which it may peak. docs/planning.md derives the terms.

What the trainer holds is enumerated: float32 masters, gradients and two moments, shards of FSDP2; the gathered copies
in the compute type; what autograd keeps of a block (tests/test_plan.py compares it with autograd's own list, tensor by
tensor); the workspace of the head. One number is fitted, `HOLES` of a CPU's heap. Bytes throughout. Imports no torch.

    n ranks that share the parameters (shard x sequence)   T tokens of a micro-batch on this rank, N targets
    H, A, K, I, V as in luffy.shapes   b bytes of the compute type (2)

Under LoRA the model's own weights are held in b bytes and nothing else is held of them; masters, gradients and moments
are those of the adapters.
"""

from dataclasses import dataclass
from typing import Literal

from luffy.shapes import Shape

GIB = 2**30
MASTER = 4  # float32: masters, gradients, each of Adam's moments
CHUNK = {"cpu": 256 << 20, "cuda": 1 << 30}  # luffy_kernels' default of `chunk_bytes`
CONTEXT = {"cpu": 0, "cuda": 1 << 30}  # what the driver, cuBLAS, NCCL and compiled kernels keep: assumed
PROCESS = 1 << 30  # on a CPU the interpreter, torch, transformers and vLLM: measured, 0.7 to 1.0
FILE = 2 << 30  # luffy.checkpoint.saving.FILE_BYTES
HOLES = 0.25  # of a heap that returns nothing, what fits nobody: fitted to the first four cases of bench.plan
Recompute = bool | Literal["selective"]
Parts = dict[str, float]

# Parts, in the order that a plan prints them.
WEIGHTS, GRADIENTS, OPTIMIZER, GATHERED = "weights", "gradients", "optimizer", "gathered weights"
ACTIVATIONS, HEAD, WORK = "activations", "head workspace", "backward workspace"
ENGINE_WEIGHTS, KV, DRIVER, HEAP = "vLLM weights", "vLLM KV cache", "driver and libraries", "freed, but kept"
COPIES = "checkpoint copies"
FORWARD = ("head, forward", "head, backward")
REDUCE = "gradients of embedding and head"
PARTS = (WEIGHTS, GRADIENTS, OPTIMIZER, GATHERED, ACTIVATIONS, HEAD, WORK, ENGINE_WEIGHTS, KV, DRIVER, HEAP, COPIES)


@dataclass(frozen=True)
class Segment:
    """A packed segment: a prompt, then rows of so many tokens each."""

    prompt: int
    rows: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        return self.prompt + sum(self.rows)


@dataclass(frozen=True, kw_only=True)
class Load:
    """What one rank of a run is asked to hold."""

    shape: Shape
    tokens: int
    """T: of the fullest micro-batch, on this rank."""
    targets: int
    """N: of them predicted by the head."""
    shards: int = 1
    """n: ranks that share the parameters."""
    sequence: int = 1
    """Ranks that share a micro-batch."""
    device: Literal["cpu", "cuda"] = "cuda"
    bytes: int = 2
    """b."""
    recompute: Recompute = False
    offload: bool = False
    """Block inputs wait in host memory."""
    mlp_tokens: int | None = None
    on_cpu: bool = False
    """Masters, gradients and moments are in host memory."""
    adapters: int = 0
    """Parameters of one block's LoRA adapters; 0: every weight is trained."""
    adapter_ranks: int = 0
    """Sum of the ranks of one block's adapters."""
    frozen: int = 0
    """Networks beside the policy that nothing trains, in the compute type; 0 of those that wait in host memory."""
    taught: int = 0
    """Networks beside the policy that are trained as it is. Their gradients are there when its own are gone."""
    accumulates: bool = True
    """More than one micro-batch an update: gradients are there before the forward pass."""
    segments: tuple[Segment, ...] = ()
    """CPU only: the layout, which decides what attention keeps; (): sequences that share nothing."""
    copied: float = 0.0
    """CUDA only: tokens of prompts whose keys and values attention copies for the rows that share them, for each token
    of the micro-batch."""
    engine: float = 0.0
    """Bytes of vLLM's weights."""
    kv: float = 0.0
    """Bytes of vLLM's cache and its own activations."""

    @property
    def trained_block(self) -> int:
        """Parameters of one block that have a gradient."""
        return self.adapters or self.shape.block

    @property
    def trained_root(self) -> int:
        return 0 if self.adapters else self.shape.root

    @property
    def trained_head(self) -> int:
        return 0 if self.adapters else self.shape.head

    @property
    def trained(self) -> int:
        return self.shape.layers * self.trained_block + self.trained_root


def moments(load: Load) -> dict[str, Parts]:
    """Bytes by part at each moment that may be the peak. A part that is absent is 0."""
    shape, resident = load.shape, _resident(load)
    kept = shared_activations(load) + (0 if load.offload else load.shape.layers * kept_by_block(load))
    if load.offload and load.device == "cpu":
        kept += load.shape.layers * kept_by_block(load)
    accumulated = resident | {GRADIENTS: _gradients(load, load.trained) if load.accumulates else 0.0}
    head = accumulated | {GATHERED: _gathered(load, backward=False), ACTIVATIONS: kept}
    first = accumulated | {GATHERED: _gathered(load, backward=True), ACTIVATIONS: kept}
    last = resident | {
        GRADIENTS: _gradients(load, load.trained if load.accumulates else shape.layers * load.trained_block),
        GATHERED: _gathered(load, backward=True, blocks=1),
        ACTIVATIONS: shared_activations(load) + kept_by_block(load),
    }
    waiting = load.bytes * load.trained_head  # the gradient of the head, until that of the embedding joins it
    return {
        FORWARD[0]: head | {HEAD: head_forward(load)},
        FORWARD[1]: head | {HEAD: head_backward(load)},
        "first block backward": first | {HEAD: waiting + hidden_gradient(load), WORK: block_backward(load)},
        "last block backward": last | {HEAD: waiting + hidden_gradient(load), WORK: block_backward(load)},
        REDUCE: resident
        | {GRADIENTS: _gradients(load, load.trained), WORK: _reduction(load, load.trained_root, last=True)},
    }


def peak(load: Load) -> tuple[str, Parts]:
    """The moment that needs most, and its parts; on a CPU with what its heap keeps."""
    found = moments(load)
    name, parts = max(found.items(), key=lambda item: sum(item[1].values()))
    return name, parts if load.device == "cuda" else parts | {HEAP: _heap(load, found, sum(parts.values()))}


def _heap(load: Load, found: dict[str, Parts], live: float) -> float:
    """Free memory of a process that keeps what it frees (`luffy.process`), when `live` bytes are not free.

    The forward pass leaves small pieces, the backward pass wants few and large ones: the gradients, and the reductions
    of a block and of the root. Neither is served from the other's, so that what they need adds up, and of both a share
    is lost in holes.
    """
    forward = max(sum(found[name].get(part, 0.0) for part in (GATHERED, ACTIVATIONS, HEAD)) for name in FORWARD)
    last = found[REDUCE]
    backward = last[GRADIENTS] + last[WORK] + block_backward(load) + _reduction(load, load.trained_block)
    resident = sum(size for part, size in last.items() if part not in (GRADIENTS, WORK))
    return max(0.0, resident + (1 + HOLES) * (forward + backward) - live)


def beside_updates(load: Load, saves: bool) -> Parts:
    """What a rank holds on a CPU that an update alone does not: its libraries, and copies of a checkpoint that is
    written while it goes on (`saves`). bench.plan measures without both.

    A copy of weights and moments is made; safetensors then takes twice what goes into one file, first for the weights,
    whose copies are then let go of, then for the moments. On a GPU all that is the host's.
    """
    if load.device == "cuda":
        return {}
    resident = _resident(load)
    weights, moments = resident[WEIGHTS], resident[OPTIMIZER]
    copies = moments + max(weights + 2 * min(FILE, weights), 2 * min(FILE, moments))
    return {DRIVER: float(PROCESS), COPIES: copies if saves else 0.0}


def host_bytes(load: Load) -> float:
    """Bytes of host memory of this rank, beside what the process and its libraries take."""
    if load.device == "cpu":
        return sum(peak(load)[1].values())
    whole = load.shape.parameters
    held = 4 * MASTER * (load.trained + load.taught * whole) + (load.bytes * whole if load.adapters else 0)
    optimizer = held / load.shards if load.on_cpu else 0.0
    return optimizer + (load.shape.layers * kept_by_block(load) if load.offload else 0.0)


def _resident(load: Load) -> Parts:
    share = 0.0 if load.on_cpu and load.device == "cuda" else 1 / load.shards
    frozen = load.bytes * load.shape.parameters if load.adapters else 0
    beside, fixed = load.taught * load.shape.parameters, load.frozen * load.bytes * load.shape.parameters
    return {
        WEIGHTS: (MASTER * (load.trained + beside) + frozen) * share + fixed / load.shards,
        OPTIMIZER: 2 * MASTER * (load.trained + beside) * share,
        ENGINE_WEIGHTS: load.engine,
        KV: load.kv,
        DRIVER: float(CONTEXT[load.device]),
    }


def _gradients(load: Load, parameters: float) -> float:
    return 0.0 if load.on_cpu and load.device == "cuda" else MASTER * parameters / load.shards


def _gathered(load: Load, backward: bool, blocks: int | None = None) -> float:
    """Copies in the compute type. One rank keeps all until their backward; several keep the root's and, of the blocks,
    the one at work and the one on its way, each as the collective's buffer and as the parameters copied out of it."""
    shape, b = load.shape, load.bytes
    block = shape.block + load.adapters
    if load.shards == 1:
        return b * (shape.root + (shape.layers if blocks is None else blocks) * block)
    return b * (shape.root + (4 if backward else 3) * block)


def _reduction(load: Load, parameters: float, last: bool = False) -> float:
    """Gradients in the compute type, the float32 input of the reduce-scatter made of them, and its result. One rank
    divides a copy of the input. A new result beside an accumulated gradient lives until it is added."""
    copies = 2 if load.shards == 1 else 1
    narrow = 0 if last and load.shards == 1 else load.bytes  # freed before the copy is made
    fresh = MASTER / load.shards if load.accumulates else 0.0
    return (narrow + copies * MASTER + fresh) * parameters


# --- activations ---------------------------------------------------------------------------------------------------


def norm_saves(load: Load, width: int, tokens: float) -> float:
    """A root-mean-square norm keeps its input in float32, the inverse root of each row, the normed row if its weight is
    trained and, for the product that follows, its own result."""
    copies = 1 if load.adapters else 2
    return tokens * (4 * width + 4 + copies * load.bytes * width)


def attention_saves(load: Load) -> float:
    """What attention proper keeps of one block: queries, keys, values, output, and a log-sum-exp a head and token."""
    shape, tokens = load.shape, load.tokens
    if load.device == "cuda":  # in the compute type, heads of keys and values as they are
        repeats = max(1.0, load.sequence / shape.kv_heads)
        width = 2 * shape.attention + 2 * shape.key * repeats * (1 + load.copied)
        return tokens * (load.bytes * width + 4 * shape.heads)
    saved = tokens * 4 * (4 * shape.attention + shape.heads)  # in float32, with keys and values repeated
    for segment in load.segments:
        if len(segment.rows) > 1:  # prompt and row side by side, and a float32 mask of the two
            for row in segment.rows:
                both = segment.prompt + row
                saved += 2 * 4 * both * shape.attention + 4 * row * both
    return saved


def mlp_saves(load: Load, tokens: float) -> float:
    """gate, its activation, up, and their product."""
    return 4 * load.bytes * load.shape.intermediate * tokens


def saved_by_block(load: Load) -> float:
    """What one block's forward pass keeps for its backward, without any recomputation."""
    shape, tokens = load.shape, load.tokens
    norms = 2 * norm_saves(load, shape.hidden, tokens)
    row = 4 + (0 if load.adapters else load.bytes)  # of a norm whose result no product reads
    norms += (shape.block_norms - 2) * tokens * row * shape.hidden
    if shape.qk_norm:
        norms += tokens * (row * (shape.attention + shape.key) + 4 * (shape.heads + shape.kv_heads))
    whole = load.mlp_tokens is None or load.mlp_tokens >= tokens
    out = load.bytes * shape.attention * tokens  # what the output projection reads
    between = load.bytes * load.adapter_ranks * tokens  # A x, which B reads
    return norms + attention_saves(load) + out + between + (mlp_saves(load, tokens) if whole else 0.0)


def kept_by_block(load: Load) -> float:
    """What stays of a block between its forward and its backward pass."""
    shape, tokens, b = load.shape, load.tokens, load.bytes
    if load.recompute is False:
        return saved_by_block(load)
    inputs = b * shape.hidden * tokens
    if load.recompute is True:
        return inputs
    products = b * (shape.attention + 2 * shape.key + 2 * shape.hidden) * tokens
    if load.mlp_tokens is None or load.mlp_tokens >= tokens:
        products += 2 * b * shape.intermediate * tokens
    flash = tokens * ((4 if load.device == "cpu" else b) * shape.attention + 4 * shape.heads)
    return inputs + products + flash


def shared_activations(load: Load) -> float:
    """Kept once: rotations, the final norm, the hidden states and those of the targets, masks of shared prompts."""
    shape, b = load.shape, load.bytes
    rotations = 2 * b * shape.head_dim * load.tokens
    masks = {(row, segment.prompt) for segment in load.segments if len(segment.rows) > 1 for row in segment.rows}
    return (
        rotations
        + norm_saves(load, shape.hidden, load.tokens)
        + b * shape.hidden * load.targets
        + sum(row * (row + prompt) for row, prompt in masks)
    )


# --- head ----------------------------------------------------------------------------------------------------------


def chunk_rows(load: Load) -> int:
    """Rows of a chunk: `luffy_kernels._cpp_rows` on CPU, on a device float32 logits and dz in the compute type."""
    row = load.shape.vocabulary * (2 if load.device == "cpu" and load.bytes == 2 else 4 + (load.device == "cuda") * 2)
    most = min(1024 if load.device == "cpu" else 1 << 30, CHUNK[load.device] // row)
    return min(max(64, most // 64 * 64), -(-load.targets // 64) * 64)


def head_forward(load: Load) -> float:
    """dW in float32, dh in the compute type, the chunk, and what its rows widen to."""
    shape, b = load.shape, load.bytes
    rows = chunk_rows(load)
    per_row = shape.vocabulary * (b if load.device == "cpu" else 4 + b) + shape.hidden * (4 * b + 12)
    return MASTER * load.trained_head + b * shape.hidden * load.targets + rows * per_row


def head_backward(load: Load) -> float:
    """Both gradients as they were saved and as they are scaled, and the hidden states' gradient."""
    shape, b = load.shape, load.bytes
    return (MASTER + b) * load.trained_head + 2 * b * shape.hidden * load.targets


def hidden_gradient(load: Load) -> float:
    """Of the residual stream, between blocks."""
    return 2 * load.bytes * load.shape.hidden * load.tokens


# --- backward of a block -------------------------------------------------------------------------------------------


def block_backward(load: Load) -> float:
    """A recomputed block, the widest gradients on the way through it, and the reduction of its parameters' own."""
    shape, tokens, b = load.shape, load.tokens, load.bytes
    recomputed = 0.0 if load.recompute is False else saved_by_block(load)
    if load.recompute == "selective":
        recomputed = max(0.0, recomputed - kept_by_block(load))
    piece = tokens if load.mlp_tokens is None else min(load.mlp_tokens, tokens)
    mlp: float = 4 * b * shape.intermediate * piece
    if piece < tokens:
        mlp += mlp_saves(load, piece)
    if load.device == "cpu":
        attention = tokens * 4 * 5 * shape.attention
    else:
        attention = tokens * b * 4 * (shape.attention + shape.key)
    norm = tokens * 4 * 3 * shape.hidden
    # attention's gradients follow when what the MLP kept is gone
    freed = mlp_saves(load, tokens) if piece == tokens else 0.0
    widest = max(mlp, norm, attention - freed)
    block = load.trained_block
    reduced = _reduction(load, block) + (0 if load.shards == 1 else MASTER * block)  # one more in flight
    return recomputed + widest + (reduced if load.shards > 1 else load.bytes * block)
