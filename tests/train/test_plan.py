"""Plans of a step: every completion once, the same number of batches everywhere, little waiting."""

import random
from collections import Counter

import pytest

from geo_r1.kernels.layout import plan_batches
from geo_r1.train.parallel.plan import StepPlan, plan_step


def cost_of(prompt: int, completions, group: int) -> float:
    """Like a model of about a billion parameters: products grow with tokens, attention with visible pairs."""
    own = sum(completions)
    pairs = prompt * prompt / 2 + sum(prompt * n + n * n / 2 for n in completions)
    return 6e9 * (prompt + own) + 2e6 * pairs + 5e8 * own * (group % 2)


def draw(seed: int, num_groups: int, members: int, prompt=(300, 5000), completion=(50, 2048)):
    g = random.Random(seed)
    prompts = [g.randint(*prompt) for _ in range(num_groups)]
    return prompts, [[g.randint(*completion) for _ in range(members)] for _ in range(num_groups)]


def plan(prompts, completions, num_ranks: int, max_tokens: int, home=None) -> StepPlan:
    """A plan that is checked for all that every plan must hold."""
    num_groups = len(prompts)
    home = [i % num_ranks for i in range(num_groups)] if home is None else home
    args = (prompts, completions, cost_of, home, num_ranks, max_tokens)
    step = plan_step(*args)
    assert plan_step(*args) == step

    assert len(step.batches) == len(step.cost) == num_ranks
    assert {len(batches) for batches in step.batches} == {step.num_batches}
    assert all(any(row) for row in zip(*step.batches, strict=True))  # no micro-batch is idle everywhere

    pieces = [piece for batches in step.batches for batch in batches for piece in batch]
    members = Counter((group, i) for group, own in pieces for i in own)
    expected = {(group, i) for group, own in enumerate(completions) for i in range(len(own))}
    assert set(members) == expected and set(members.values()) <= {1}
    assert {group for group, _ in pieces} == set(range(num_groups))
    for group, own in enumerate(completions):
        if not own:
            assert pieces.count((group, ())) == 1

    sizes = {piece: prompts[piece[0]] + sum(completions[piece[0]][i] for i in piece[1]) for piece in pieces}
    assert step.num_tokens == sum(sizes.values())
    needed = sum(prompts) + sum(map(sum, completions))
    assert step.repeated_tokens == step.num_tokens - needed
    for batches, costs in zip(step.batches, step.cost, strict=True):
        assert list(costs) == sorted(costs, reverse=True)
        for batch, cost in zip(batches, costs, strict=True):
            assert sum(sizes[piece] for piece in batch) <= max_tokens
            assert len({group for group, _ in batch}) == len(batch)
            work = [cost_of(prompts[g], [completions[g][i] for i in own], g) for g, own in batch]
            assert cost == pytest.approx(sum(work))

    owners = {(g, r) for r, batches in enumerate(step.batches) for batch in batches for g, _ in batch}
    assert step.moved == tuple(sorted((g, home[g], r) for g, r in owners if r != home[g]))
    return step


def idle(step):
    """Micro-batches with nothing in them, over all ranks."""
    return sum(batch == () for batches in step.batches for batch in batches)


def imbalance(step):
    """The heaviest rank's cost over the mean."""
    costs = [*map(sum, step.cost)]
    return max(costs) * len(costs) / sum(costs)


def stay_home(prompts, completions, num_ranks: int, max_tokens: int) -> tuple[int, float, float]:
    """What each rank by itself would do with its every num_ranks-th group: (batches, imbalance, waiting)."""
    costs = []
    for rank in range(num_ranks):
        own = range(rank, len(prompts), num_ranks)
        packed = plan_batches([prompts[g] for g in own], [completions[g] for g in own], max_tokens).batches
        work = [
            sum(cost_of(prompts[own[k]], [completions[own[k]][i] for i in m], own[k]) for k, m in batch)
            for batch in packed
        ]
        costs.append(sorted(work, reverse=True))
    most, mean = max(map(len, costs)), sum(map(sum, costs)) / num_ranks
    waiting = sum(max(c[i] if i < len(c) else 0.0 for c in costs) for i in range(most))
    return most, max(map(sum, costs)) / mean, waiting / mean


# Ranks, groups, completions of each, budget, and bounds on the heaviest rank and on waiting. Where a batch
# has room for one group, waiting is what neighbours among groups sorted by cost differ by.
DRAWS = {
    "one group a batch": (8, 64, 8, 16384, 1.05, 1.12),
    "two to three groups a batch": (8, 64, 8, 32768, 1.08, 1.08),
    "everything in two batches": (8, 64, 8, 65536, 1.06, 1.06),
    "supervised": (8, 256, 1, 16384, 1.05, 1.05),
    "many ranks": (32, 256, 8, 32768, 1.08, 1.10),
    "three ranks": (3, 20, 4, 16384, 1.10, 1.10),
}


@pytest.mark.parametrize("name", DRAWS)
def test_ranks_wait_little(name):
    num_ranks, num_groups, members, max_tokens, heaviest, waiting = DRAWS[name]
    for seed in range(4):
        prompts, completions = draw(seed, num_groups, members)
        step = plan(prompts, completions, num_ranks, max_tokens)
        assert imbalance(step) <= heaviest and step.waiting <= waiting, seed
        home_batches, _, home_waiting = stay_home(prompts, completions, num_ranks, max_tokens)
        assert step.num_batches <= home_batches
        # every group that moved is paid for by a shorter step
        assert step.num_batches < home_batches or not step.moved or step.waiting < home_waiting


def test_moves_far_fewer_groups_than_dealing_them_out():
    moved = 0
    for seed in range(4):
        step = plan(*draw(seed, 64, 8), 8, 65536)
        moved += len(step.moved)
    assert 0 < moved <= 4 * 64 // 4


@pytest.mark.parametrize("seed", range(30))
def test_any_draw_holds_the_laws(seed):
    g = random.Random(seed)
    num_groups, num_ranks = g.randint(0, 14), g.randint(1, 6)
    prompts = [g.choice((0, 1, g.randint(1, 300))) for _ in range(num_groups)]
    completions = [
        [g.choice((0, 1, g.randint(1, 200))) for _ in range(g.randint(0, 9))] for _ in range(num_groups)
    ]
    home = [g.randrange(num_ranks) for _ in range(num_groups)]
    plan(prompts, completions, num_ranks, g.choice((500, 700, 1000, 5000)), home)


@pytest.mark.parametrize("seed", range(5))
def test_one_rank_is_plan_batches(seed):
    prompts, completions = draw(seed, 12, 6, prompt=(10, 400), completion=(0, 300))
    completions[3] *= 4  # over the budget
    completions[7] = [200] * 20  # pieces of one size
    step = plan(prompts, completions, 1, 1000)
    packed = plan_batches(prompts, completions, 1000)
    assert Counter(step.batches[0]) == Counter(packed.batches)
    assert (step.num_tokens, step.repeated_tokens) == (packed.num_tokens, packed.repeated_tokens)
    assert step.moved == () and imbalance(step) == step.waiting == 1.0


def test_no_groups_no_batches():
    step = plan([], [], 4, 100)
    assert step.batches == ((), (), (), ()) and step.num_batches == 0
    assert step.waiting == 1.0 and step.num_tokens == 0


def test_fewer_groups_than_ranks():
    step = plan([10, 20], [[5, 5], [7]], 4, 100, home=[2, 2])
    assert step.num_batches == 1 and idle(step) == 2
    assert sum(map(len, (batch for batches in step.batches for batch in batches))) == 2
    (_, home, owner), *others = step.moved  # one of the two goes to an idle rank
    assert home == 2 and owner != 2 and not others

    step = plan([10, 20], [[5, 5], [7]], 4, 100, home=[3, 1])
    assert step.moved == () and step.batches == (((),), (((1, (0,)),),), ((),), (((0, (0, 1)),),))


def test_one_giant_group_is_shared_out():
    step = plan([100], [[50] * 64], 4, 900, home=[1])
    assert step.num_batches == 1 and idle(step) == 0 and step.repeated_tokens == 300
    assert step.moved == ((0, 1, 0), (0, 1, 2), (0, 1, 3))
    assert imbalance(step) == 1.0


def test_all_at_one_home():
    prompts, completions = [100] * 16, [[50] * 4] * 16
    step = plan(prompts, completions, 4, 1200, home=[0] * 16)
    assert step.num_batches == 1 and len(step.moved) == 12
    assert {len(batches[0]) for batches in step.batches} == {4}


def test_equal_groups_stay_home():
    step = plan([100] * 24, [[50] * 4] * 24, 8, 1000)
    assert step.moved == () and step.num_batches == 1 and step.waiting < 1.2


def test_number_of_batches_comes_first():
    """Three big groups on one rank and one on the other: two rows and not three, though all costs say so."""
    step = plan([10] * 4, [[80]] * 4, 2, 100, home=[0, 0, 0, 1])
    assert step.num_batches == 2 and idle(step) == 0 and len(step.moved) == 1


def test_full_batches_that_first_fit_does_not_find():
    """49 of 50 tokens; first-fit decreasing, by size, needs three batches of 25."""
    prompts, completions = [1, 2, 3, 0, 2, 3], [[2], [2], [8], [8], [3], [15]]
    assert len(plan_batches(prompts, completions, 25).batches) == 3
    assert plan(prompts, completions, 2, 25, home=[0, 0, 0, 0, 0, 1]).num_batches == 1


def test_fewer_batches_where_one_rank_fills_them_all():
    """60 of 60 tokens, all at one home: its two batches are dealt to two ranks, not kept in two rows."""
    prompts, completions = [1, 2, 1, 0, 1, 3, 3], [[6], [5], [1], [18], [4], [10], [5]]
    step = plan(prompts, completions, 2, 30, home=[0] * 7)
    assert step.num_batches == 1 and idle(step) == 0


def test_equal_pieces_keep_their_order():
    """Pieces (2, 3) and (0, 1) are of one size; the first that was made takes the small group in."""
    prompts, completions = [100, 2], [[250, 250, 400, 100], [3]]
    step = plan(prompts, completions, 1, 605)
    assert set(step.batches[0]) == {((0, (2, 3)), (1, (0,))), ((0, (0, 1)),)}


def test_figures_of_a_plan():
    step = plan([100] * 3, [[50] * 2, [50] * 2, [50] * 30], 2, 1000, home=[0, 0, 0])
    assert (step.num_tokens, step.repeated_tokens, step.num_batches) == (2100, 100, 2)
    assert (idle(step), len(step.moved)) == (1, 3)
    assert (round(imbalance(step), 3), round(step.waiting, 3)) == (1.049, 1.139)


def test_errors_name_the_group():
    with pytest.raises(ValueError, match="group 2: a prompt of 90 tokens with a completion of 20 is over"):
        plan([10, 10, 90], [[5], [5], [20]], 2, 100)
    with pytest.raises(ValueError, match="group 1: a length must be an integer >= 0, got -3"):
        plan([10, 10], [[5], [-3]], 2, 100)
    with pytest.raises(ValueError, match="group 1: its home is rank 2, but there are 2 ranks"):
        plan([10, 10], [[5], [5]], 2, 100, home=[0, 2])
