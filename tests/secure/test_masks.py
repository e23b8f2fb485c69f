"""The masked sum: exact, with drop-outs below the threshold, and nothing below it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import fedmerge as fm
from fedmerge.errors import ConfigError, ParamsError, RoundError
from fedmerge.secure import Party, decode, encode, masked_sum, unmask

RNG = np.random.default_rng(5)


def vectors(n: int, size: int = 40) -> dict[int, np.ndarray]:
    """Words of the whole range, under numbers that are not in a row."""
    return {3 * i + 1: RNG.integers(0, 2**64, size, dtype=np.uint64) for i in range(n)}


def plainly(given: dict[int, np.ndarray]) -> list[int]:
    """The sum in Python's own integers."""
    return [sum(int(v[k]) for v in given.values()) % 2**64 for k in range(len(next(iter(given.values()))))]


@pytest.mark.parametrize(
    ("n", "threshold", "gone"), [(2, 2, ()), (3, 2, (4,)), (7, 4, ()), (7, 4, (1, 10, 19)), (12, 7, (34,))]
)
def test_the_masked_sum_is_the_plain_sum_exactly_also_with_drop_outs(n: int, threshold: int, gone: tuple) -> None:
    given = vectors(n)
    found = masked_sum(given, threshold, gone=gone)
    assert found.tolist() == plainly({i: v for i, v in given.items() if i not in gone})


def test_the_sum_of_encoded_networks_is_their_weighted_mean() -> None:
    nets = [nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6)).state_dict() for _ in range(3)]
    weights = [700, 1, 299]
    for i, net in enumerate(nets):  # statistics, and a counter that stays whole
        net |= {"1.num_batches_tracked": torch.tensor(i), "1.running_var": torch.rand(6)}
    total = decode(
        masked_sum({i: encode(n, w, 3) for i, (n, w) in enumerate(zip(nets, weights, strict=True))}, 2), nets[0]
    )
    assert total.weight == 1000
    assert [t.dtype for t in total.mean.values()] == [t.dtype for t in nets[0].values()]
    for name, tensor in total.mean.items():
        exact = sum(net[name].double() * w for net, w in zip(nets, weights, strict=True)) / 1000
        assert float((tensor.double() - exact).abs().max()) <= (2**-24 if tensor.is_floating_point() else 0.5), name


@pytest.mark.parametrize("weight", [0, -1, 1.5])
def test_a_weight_that_is_no_positive_whole_number_is_refused(weight: float) -> None:
    with pytest.raises(ParamsError, match="of 1 terms of a masked sum; give whole numbers from 1"):
        encode({"w": torch.ones(2)}, weight, 2)  # type: ignore[arg-type]


def test_the_sums_of_an_analytic_head_travel_in_the_same_way() -> None:
    images = fm.data.load("digits").train.select(range(90))
    model = fm.models.build("mlp", classes=10, in_shape=(1, 8, 8), width=8, seed=0)
    parts = [images.select(range(i, 90, 3)) for i in range(3)]
    sums = [fm.head_sums(model, model.state_dict(), part) for part in parts]
    tensors = [{k: v for k, v in vars(s).items() if isinstance(v, torch.Tensor)} for s in sums]
    assert tensors[0]
    total = decode(masked_sum({i: encode(t, 1, 3) for i, t in enumerate(tensors)}, 2), tensors[0])
    for name, mean in total.mean.items():
        torch.testing.assert_close(3 * mean, sum(t[name] for t in tensors), rtol=0, atol=3 * 2**-28)


def test_numbers_without_room_and_those_that_are_none_are_refused_before_they_are_sent() -> None:
    with pytest.raises(ParamsError, match=r"tensor 'w' holds 1e\+08; .* 12 networks of weight 5000 has room for"):
        encode({"w": torch.tensor([1e8])}, 5000, 12)
    for weight, parties in ((2**63, 2), (2**62, 2), (2**61, 12)):
        with pytest.raises(ParamsError, match=f"weight {weight} of {parties} parties leaves no room"):
            encode({"w": torch.zeros(1)}, weight, parties)
    with pytest.raises(ParamsError, match="tensor 'w' holds nan"):
        encode({"w": torch.tensor([float("nan")])}, 1, 2)


@pytest.mark.parametrize(("n", "threshold"), [(5, 1), (5, 6)])
def test_a_threshold_that_hides_nothing_or_cannot_be_met_is_refused(n: int, threshold: int) -> None:
    with pytest.raises(ConfigError, match=rf"of {n} clients with a threshold of {threshold}: expected 2 .* to {n}$"):
        masked_sum(vectors(n), threshold)


class Sum:
    """A sum taken step by step, up to the words."""

    def __init__(self, n: int = 5, threshold: int = 3) -> None:
        self.given, self.threshold = vectors(n), threshold
        self.parties = {i: Party(i, threshold) for i in self.given}
        self.roster = {i: p.keys for i, p in self.parties.items()}
        self.sealed: dict[int, dict[int, bytes]] = {i: {} for i in self.parties}
        for i, party in self.parties.items():
            self.parties[i], sent = party.share(self.roster)
            for other, part in sent.items():
                self.sealed[other][i] = part
        self.masked = {}
        for i, party in self.parties.items():
            self.parties[i], self.masked[i] = party.mask(self.given[i], self.sealed[i])

    def unmask(self, masked: dict, opened: dict, threshold: int = 0) -> np.ndarray:
        return unmask(masked, opened, roster=self.roster, sent=self.parties, threshold=threshold or self.threshold)


def test_above_the_threshold_of_drop_outs_the_round_fails_with_its_reason_and_nothing_leaks() -> None:
    s = Sum()
    left = {i: s.masked[i] for i in (1, 4)}
    for i in left:  # nobody opens a mask for so few
        with pytest.raises(RoundError, match="2 of 5 parties sent words, the threshold is 3"):
            s.parties[i].open(left)
    opened = {i: s.parties[i].open(list(s.masked))[1] for i in (1, 4)}
    with pytest.raises(RoundError, match="5 of 5 masked networks came and 2 clients opened .* threshold is 3"):
        s.unmask(s.masked, opened)
    # A server that goes on nevertheless gets seeds that are none: what it makes of them is not the sum, nor a term.
    found = s.unmask(s.masked, opened, threshold=2)
    assert not (found == np.array(plainly(s.given), dtype=np.uint64)).any()


def test_a_party_takes_each_step_once_so_that_no_network_is_told_by_the_difference_of_two() -> None:
    s = Sum()
    fewer = [i for i in s.masked if i != 13]
    with pytest.raises(RoundError, match="party 1 has sent shares once"):
        s.parties[1].share({i: s.roster[i] for i in fewer})
    with pytest.raises(RoundError, match="party 1 has sent its words once; a second time, for others, could tell"):
        s.parties[1].mask(s.given[1], {i: s.sealed[1][i] for i in fewer})
    party, shares = s.parties[1].open(list(s.masked))
    assert len(shares) == 5
    with pytest.raises(RoundError, match="party 1 has opened masks once"):
        party.open(fewer)


def test_a_party_takes_no_part_where_its_own_keys_were_exchanged_or_too_few_are_there() -> None:
    party, other = Party(1, 2), Party(2, 2)
    with pytest.raises(RoundError, match="party 1 takes no part"):
        party.share({1: other.keys, 2: other.keys})
    with pytest.raises(RoundError, match="takes no part in a sum of 1; its threshold: 2"):
        party.share({1: party.keys})
    with pytest.raises(RoundError, match="a public key that is none"):
        party.share({1: party.keys, 2: bytes(64)})


def test_shares_that_another_wrote_are_found_out() -> None:
    s = Sum()
    forged = {**s.sealed[1], 7: s.sealed[4][7]}  # sealed for party 4
    with pytest.raises(RoundError, match="the shares of party 7 are not its own"):
        replace(s.parties[1], sealed=forged).open(list(s.masked))
    left = {i: v for i, v in s.masked.items() if i != 10}
    opened = {i: s.parties[i].open(left)[1] for i in left}
    wrong = {i: {**shares, 10: bytes(16)} for i, shares in opened.items()}
    with pytest.raises(RoundError, match="client 10, which dropped out, do not fit its key"):
        s.unmask(left, wrong)


def test_masked_words_look_random_whatever_the_words_are() -> None:
    n = 4096
    given = {i: np.full(n, i, dtype=np.uint64) for i in range(3)}
    roster: dict = {}
    parties = {i: Party(i, 2) for i in given}
    roster = {i: p.keys for i, p in parties.items()}
    shared = {i: p.share(roster) for i, p in parties.items()}
    for i in given:
        _, masked = shared[i][0].mask(given[i], {j: shared[j][1][i] for j in given})
        counts = np.bincount(masked.view(np.uint8), minlength=256)
        chi2 = float(((counts - n * 8 / 256) ** 2 / (n * 8 / 256)).sum())
        assert 140 < chi2 < 400  # 255 degrees of freedom: mean 255, deviation 22.6
        assert len(np.unique(masked)) == n
