"""Which rows share a micro-batch, and which rank computes it.

    cost = tokens + attention_weight x attended pairs (query, key)

Ranks gather every block's weights together and so walk their micro-batches in step: slot k of all ranks takes as long
as its costliest micro-batch. What is kept small is the sum of that over the slots, then slots and repeated
prompts; docs/packing.md has the reasons and what was tried.

    _fill    micro-batches one after the other, whole groups where they fit, else a cut that comes near the target
    _deal    micro-batches of similar cost into one slot, slots so that the ranks' totals come out even
    _even    exchanges within a slot, until its costliest micro-batch is near the mean

A function of its arguments, so that every rank finds the same plan without a word to the others. Imports no torch.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

from luffy.groups import Group, Row

SLACK = 0.01  # of the cost aimed at: near enough not to cut a group, or to exchange rows, for it
WORTH = 0.03  # of the step's cost: what one more slot has to save
CUT_ROWS = 8  # rows whose subsets are tried for a cut: 2^8 sums
CUT_GROUPS = 16  # groups tried for a cut


@dataclass(slots=True)
class Unit:
    """A prompt and rows that share it in one micro-batch."""

    prompt_ids: tuple[int, ...]
    rows: list[Row]
    group: int = 0
    """Number of the group among those that were packed."""

    @property
    def tokens(self) -> int:
        """That enter the body: the prompt, and every row without its last token."""
        return len(self.prompt_ids) + sum(len(row.token_ids) - 1 for row in self.rows)

    @property
    def pairs(self) -> int:
        """(query, key) that attend: causal within the prompt; each row to all of the prompt and, causally, itself."""
        p = len(self.prompt_ids)
        sizes = [len(row.token_ids) - 1 for row in self.rows]
        return p * (p + 1) // 2 + sum(n * p + n * (n + 1) // 2 for n in sizes)

    def cost(self, attention_weight: float) -> float:
        return self.tokens + attention_weight * self.pairs


Bin = list[Unit]
"""What one micro-batch holds; nothing, where a rank has to keep step with others."""
Slot = list[Bin]
"""One micro-batch of every rank."""


def plan(
    groups: list[Group],
    rows_of: Callable[[Group], list[Row]],
    budget: int,
    ranks: int = 1,
    attention_weight: float = 0.0,
) -> list[Slot]:
    """[slot][rank] -> units: what `luffy.packing.pack` assembles, for all ranks. Arguments and errors as there."""
    if budget < 1:
        raise ValueError(f"pack: budget must be a positive number of tokens, got {budget}")
    units = [Unit(group.example.prompt_ids, rows_of(group), n) for n, group in enumerate(groups)]
    units = [unit for unit in units if unit.rows]
    if not all(row.token_ids for unit in units for row in unit.rows):
        raise ValueError("pack: every row must have at least one token, got one without")
    placed = _first_fit([part for unit in units for part in _split(unit, budget)], budget)
    if ranks == 1 or not units:  # nobody waits for anybody: the fewest micro-batches are the best
        return [[units] for units in placed]

    @cache
    def filled(slots: int) -> list[Bin] | None:
        return _fill(units, budget, slots, ranks, attention_weight)

    enough = -(-len(placed) // ranks)
    fewest = min(enough, -(-sum(unit.tokens for unit in units) // (budget * ranks)))
    slots = fewest + bisect_left(range(fewest, enough), True, key=lambda slots: filled(slots) is not None)
    best = _balanced(filled(slots) or placed, budget, ranks, attention_weight)
    if more := filled(slots + 1):
        looser = _balanced(more, budget, ranks, attention_weight)
        if critical_cost(looser, attention_weight) < (1 - WORTH) * critical_cost(best, attention_weight):
            return looser
    return best


def _balanced(bins: list[Bin], budget: int, ranks: int, weight: float) -> list[Slot]:
    slots = _deal(bins, ranks, weight)
    for slot in slots:
        _even(slot, budget, weight)
    return _deal([units for slot in slots for units in slot], ranks, weight)


def bin_cost(units: Bin, attention_weight: float) -> float:
    """Of a micro-batch; an empty one computes one token."""
    return sum((unit.cost(attention_weight) for unit in units), 0.0) or 1 + attention_weight


def critical_cost(slots: list[Slot], attention_weight: float) -> float:
    """Of a step: in every slot all ranks wait for the costliest."""
    return sum(max(bin_cost(units, attention_weight) for units in slot) for slot in slots)


def _split(unit: Unit, budget: int) -> list[Unit]:
    """Rows in their order, a new unit where the budget is full."""
    parts: list[Unit] = []
    for row in unit.rows:
        if not parts or parts[-1].tokens + len(row.token_ids) > budget:
            parts.append(Unit(unit.prompt_ids, [], unit.group))
        parts[-1].rows.append(row)
    return parts


def _first_fit(units: list[Unit], budget: int) -> list[Bin]:
    """Largest first, each into the first micro-batch that has room."""
    bins: list[Bin] = []
    room: list[int] = []
    for unit in sorted(units, key=lambda unit: -unit.tokens):
        tokens = unit.tokens
        index = next((i for i, free in enumerate(room) if free >= tokens), None)
        if index is None:
            bins.append([])
            room.append(budget)
            index = len(bins) - 1
        bins[index].append(unit)
        room[index] -= tokens
    return bins


class _Piece:
    """Rows of a group that have no micro-batch yet, costliest first, and their sizes."""

    def __init__(self, unit: Unit, weight: float) -> None:
        self.unit = unit
        p = len(unit.prompt_ids)
        self.prompt = p, p + weight * (p * (p + 1) // 2)
        unit.rows.sort(key=lambda row: -len(row.token_ids))  # stable, so that every rank has the same order
        sizes = [len(row.token_ids) - 1 for row in unit.rows]
        self.sizes = [(n, n + weight * (n * p + n * (n + 1) // 2)) for n in sizes]
        self.tokens = p + sum(sizes)
        self.cost = self.prompt[1] + sum(cost for _, cost in self.sizes)

    @property
    def longest(self) -> tuple[int, float]:
        """Tokens and cost of the longest row, alone with its prompt."""
        return self.prompt[0] + self.sizes[0][0], self.prompt[1] + self.sizes[0][1]

    def nearest(self, gap: float, room: int, with_longest: bool = False) -> tuple[float, list[int]]:
        """The rows that with their prompt come nearest to a cost of `gap` within `room` tokens: (distance, indices).

        All subsets of the shortest `CUT_ROWS` rows, on top of the longer ones that fit, taken longest first. The
        longest row is among them if asked for, whether it fits or not.
        """
        gap, room = gap - self.prompt[1], room - self.prompt[0]
        if room < 0 and not with_longest:
            return float("inf"), []
        taken = []
        split = max(with_longest, len(self.sizes) - CUT_ROWS)
        for index, (tokens, cost) in enumerate(self.sizes[:split]):
            if (tokens <= room and cost <= gap) or (with_longest and index == 0):
                taken.append(index)
                gap, room = gap - cost, room - tokens
        sums: list[tuple[int, float]] = [(0, 0.0)]
        for tokens, cost in self.sizes[split:]:
            sums += [(t + tokens, c + cost) for t, c in sums]
        start = 0 if taken else 1  # a prompt alone is of no use
        fitting = [(abs(gap - c), -subset) for subset, (t, c) in enumerate(sums[start:], start) if t <= max(room, 0)]
        if not fitting:
            return float("inf"), []
        distance, subset = min(fitting)  # of equals the last: rows of one token cost nothing, so they come along
        subset = -subset
        return distance, taken + [split + bit for bit in range(len(self.sizes) - split) if subset >> bit & 1]

    def cut(self, indices: Iterable[int], weight: float) -> "tuple[_Piece, _Piece | None]":
        """The rows at `indices`, and what is left."""
        chosen = set(indices)
        parts: tuple[list[Row], list[Row]] = [], []
        for index, row in enumerate(self.unit.rows):
            parts[index not in chosen].append(row)
        made = [_Piece(Unit(self.unit.prompt_ids, rows, self.unit.group), weight) if rows else None for rows in parts]
        assert made[0] is not None
        return made[0], made[1]


def _fill(units: list[Unit], budget: int, slots: int, ranks: int, weight: float) -> list[Bin] | None:
    """slots x ranks micro-batches, filled one after the other up to what remains per micro-batch, or to the longest
    row of the slot where that is more; None if they cannot hold everything."""
    left = [_Piece(Unit(unit.prompt_ids, list(unit.rows), unit.group), weight) for unit in units]
    bins: list[Bin] = []
    level = 0.0
    for number in range(slots * ranks):
        if not left:
            bins.append([])
            continue
        share = sum(piece.cost for piece in left) / (slots * ranks - number)
        longest = max(left, key=lambda piece: piece.longest)
        if number % ranks == 0:  # the slot takes as long as this row, so its other micro-batches may, too
            level = longest.longest[1]
        # no two rows of more than half a share go together, so they must not be what is left in the end
        seed = longest if longest.longest[1] > share / 2 or longest.longest[0] > budget / 2 else None
        taken = _complete(left, max(share, level), budget, weight, seed, last=number == slots * ranks - 1)
        bins.append(_merge([piece.unit for piece in taken]))
    return bins if _spread(left, bins, budget, weight) else None


def _spread(left: list[_Piece], bins: list[Bin], budget: int, weight: float) -> bool:
    """Rows that found no place, the longest first, each into the cheapest micro-batch that has room; False if none."""
    rows = [Unit(piece.unit.prompt_ids, [row], piece.unit.group) for piece in left for row in piece.unit.rows]
    costs = [bin_cost(units, weight) for units in bins] if rows else []
    for row in sorted(rows, key=lambda unit: -unit.tokens):
        for index in sorted(range(len(bins)), key=costs.__getitem__):
            merged = _merge([*bins[index], row])
            if sum(unit.tokens for unit in merged) <= budget or not bins[index]:
                bins[index], costs[index] = merged, bin_cost(merged, weight)
                break
        else:
            return False
    return True


def _complete(
    left: list[_Piece], target: float, budget: int, weight: float, seed: _Piece | None, last: bool
) -> list[_Piece]:
    """Take from `left` what makes up one micro-batch of cost `target`: the longest row of `seed`, then the costliest
    whole pieces that fit, then some rows of one that does not."""
    taken: list[_Piece] = []
    slack = 0.0 if last else SLACK * target
    gap, room = target, budget

    def take(piece: _Piece, indices: Iterable[int] | None = None) -> None:
        nonlocal gap, room
        left.remove(piece)
        if indices is not None:
            piece, rest = piece.cut(indices, weight)
            left.extend([rest] if rest else [])
        taken.append(piece)
        gap, room = gap - piece.cost, room - piece.tokens

    if seed is not None:
        take(seed, seed.nearest(gap, room, with_longest=True)[1])
    while left and (last or gap > slack):
        limit = float("inf") if last else gap + slack
        fitting = [piece for piece in left if piece.tokens <= room and piece.cost <= limit]
        if fitting:
            take(max(fitting, key=lambda piece: piece.cost))
            continue
        best: tuple[float, list[int]] = abs(gap), []
        source = None
        for piece in sorted(left, key=lambda piece: piece.prompt[0])[:CUT_GROUPS]:  # the cheapest prompts to repeat
            found = piece.nearest(gap, room)
            if found[0] < best[0]:
                best, source = found, piece
            if best[0] <= slack:
                break
        if source is not None:
            take(source, best[1])
        break
    return taken


def _merge(units: Iterable[Unit]) -> Bin:
    """Rows of one group share its prompt again where they came together."""
    merged: dict[int, Unit] = {}
    for unit in units:
        merged.setdefault(unit.group, Unit(unit.prompt_ids, [], unit.group)).rows.extend(unit.rows)
    return list(merged.values())


def _deal(bins: list[Bin], ranks: int, weight: float) -> list[Slot]:
    """Micro-batches of similar cost into one slot; within it the costliest to the rank that has the least so far."""
    costs = [bin_cost(units, weight) for units in bins]
    order = sorted(range(len(bins)), key=lambda index: -costs[index])
    totals = [0.0] * ranks
    slots = []
    for at in range(0, len(order), ranks):
        slot: Slot = [[] for _ in range(ranks)]
        for rank, index in zip(sorted(range(ranks), key=totals.__getitem__), order[at : at + ranks], strict=False):
            slot[rank] = bins[index]
        totals = [total + bin_cost(units, weight) for total, units in zip(totals, slot, strict=True)]
        slots.append(slot)
    return slots


def _even(slot: Slot, budget: int, weight: float) -> None:
    """Exchange units or rows between the costliest micro-batch and the cheapest that helps, in place."""
    costs = [bin_cost(units, weight) for units in slot]
    limit = (1 + SLACK) * sum(costs) / len(slot)
    for _ in range(4 * len(slot)):
        high = max(range(len(slot)), key=costs.__getitem__)
        if costs[high] <= limit:
            return
        for low in sorted(range(len(slot)), key=costs.__getitem__):
            pair = _exchange(slot[high], slot[low], budget, weight) if costs[low] < limit else None
            if pair is not None:
                slot[high], slot[low] = pair
                costs[high], costs[low] = (bin_cost(units, weight) for units in pair)
                break
        else:
            return


def _exchange(high: Bin, low: Bin, budget: int, weight: float) -> tuple[Bin, Bin] | None:
    """Both after what evens them out best: a unit or a row of `high` for one of `low`, or for nothing.

    None where that takes less than a tenth of the difference off the higher one.
    """
    before, other = bin_cost(high, weight), bin_cost(low, weight)
    mine = [(part, *_moved(part, high, low, weight)) for part in _parts(high)]
    theirs = [(part, *_moved(part, low, high, weight)) for part in _parts(low)]
    offers: list[tuple[float, float, float, Unit | None]] = [(0.0, 0.0, 0.0, None)]
    offers += [(leaves + enters, leaves, enters, part) for part, leaves, enters in theirs]
    offers.sort(key=lambda offer: offer[0])
    best: tuple[float, Unit, Unit | None] | None = None
    for part, leaves, enters in mine:
        near = bisect_left(offers, leaves + enters - (before - other), key=lambda offer: offer[0])
        for _, back_leaves, back_enters, back in offers[max(0, near - 2) : near + 2]:
            cost = max(before - leaves + back_enters, other - back_leaves + enters)
            if best is None or cost < best[0]:
                best = cost, part, back
    limit = before - (before - other) / 10
    if best is None or best[0] > limit:
        return None
    _, part, back = best
    pair = _without(high, part), [*low, part]
    if back is not None:
        pair = [*pair[0], back], _without(pair[1], back)
    after = _merge(pair[0]), _merge(pair[1])
    fits = all(sum(unit.tokens for unit in units) <= budget for units in after)
    return after if fits and max(bin_cost(units, weight) for units in after) <= limit else None


def _parts(units: Bin) -> list[Unit]:
    """What may leave: units, and their rows."""
    rows = [Unit(unit.prompt_ids, [row], unit.group) for unit in units if len(unit.rows) > 1 for row in unit.rows]
    return units + rows


def _moved(part: Unit, source: Bin, target: Bin, weight: float) -> tuple[float, float]:
    """Cost that leaves `source` and cost that enters `target` with `part`: a prompt stays while a row needs it, and is
    there already where a row has it."""
    whole = part.cost(weight)
    p = len(part.prompt_ids)
    alone = whole - p - weight * (p * (p + 1) // 2)
    stays = any(unit.group == part.group and len(unit.rows) > len(part.rows) for unit in source)
    there = any(unit.group == part.group for unit in target)
    return alone if stays else whole, alone if there else whole


def _without(units: Bin, part: Unit) -> Bin:
    """`units` less the rows of `part`; rows are told apart by identity, for two may be equal."""
    gone = {id(row) for row in part.rows}
    left = [Unit(u.prompt_ids, [row for row in u.rows if id(row) not in gone], u.group) for u in units]
    return [unit for unit in left if unit.rows]
