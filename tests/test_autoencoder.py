"""The benchmark with equal tuning: it goes on where it stopped, gives every method as
many trials, keeps the test images for the end, and counts operations as formulas do.
"""

import dataclasses
import json
import math

import autoencoder as bench
import pytest
import torch
from torch.func import functional_call, jvp

SMALL = bench.Size(
    images=1000, apart=200, tests=50, trials=2, trial=400, full=800, seeds=2, points=4
)
TWO = ["SGD", "natural gradient"]
WIDTHS = bench.WIDTHS
LAYERS = [(n, n + 1, b) for n, b in zip(WIDTHS, WIDTHS[1:])]


@pytest.fixture
def events(monkeypatch):
    """What happens, in order: (method's function, examples) of runs, and looks at the
    test images.
    """
    seen = []
    for name, note in (
        ("train", lambda make, setting, examples, seed, *_: (make.__name__, examples)),
        ("test_images", lambda size: "test images"),
    ):

        def noted(*args, real=getattr(bench, name), note=note):
            seen.append(note(*args))
            return real(*args)

        monkeypatch.setattr(bench, name, noted)
    return seen


def test_goes_on_where_it_stopped_and_looks_at_the_end(events, monkeypatch, tmp_path):
    path, add = tmp_path / "log.json", bench.Log.add

    def stops(log, kind, run):
        add(log, kind, run)
        if len(log.kept["trials"]) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(bench.Log, "add", stops)
    with pytest.raises(KeyboardInterrupt):
        bench.main([*TWO, "--log", str(path)], SMALL)
    monkeypatch.setattr(bench.Log, "add", add)
    bench.main([*TWO, "--log", str(path)], SMALL)
    trials = [("sgd", 400), ("natural", 400)] * 2
    assert events[:4] == trials, "every trial once"
    ends = [("sgd", 800), "test images", ("natural", 800), "test images"] * 2
    assert events[4:] == ends, "the test images where the last runs end"
    written = path.read_text()
    bench.main([*TWO, "--log", str(path)], SMALL)
    assert len(events) == 12 and path.read_text() == written, "nothing is run again"
    kept = json.loads(written)
    for name in TWO:
        mine = [t for t in kept["trials"] if t["method"] == name]
        assert len(mine) == SMALL.trials
        assert all(t["seen"] == 400 and "test" not in t for t in mine)
        best = min(mine, key=lambda t: t["validation"])["setting"]
        runs = [r for r in kept["runs"] if r["method"] == name]
        assert [r["seed"] for r in runs] == [0, 1]
        assert all(r["setting"] == best and 0 < r["test"] < 0.1 for r in runs)


def test_more_trials_and_from_the_beginning(events, monkeypatch, tmp_path):
    path = tmp_path / "log.json"
    words = ["SGD", "--log", str(path)]
    few = dataclasses.replace(SMALL, trials=1, seeds=1)
    bench.main(words, few)
    first = json.loads(path.read_text())["hashes"]
    now = {"code": "new", "package": "new", "data": "new"}
    monkeypatch.setattr(bench, "made_with", lambda: now)
    bench.main(words, dataclasses.replace(few, trials=2))
    assert events.count(("sgd", 400)) == 2, "one trial more"
    kept = json.loads(path.read_text())["hashes"]
    assert kept == first | {"code": "new"}, "as old as the oldest run"
    with pytest.raises(SystemExit, match="another size"):
        bench.main(words, bench.Size())
    before = len(events)
    bench.main([*words, "--again"], few)
    assert events[before:] == [("sgd", 400), ("sgd", 800), "test images"]
    assert json.loads(path.read_text())["hashes"] == now


def test_a_changed_method_is_run_again(events, monkeypatch, tmp_path):
    words = ["SGD", "--log", str(tmp_path / "log.json")]
    few = dataclasses.replace(SMALL, trials=1, seeds=1)
    bench.main(words, few)
    now = bench.METHODS["SGD"]._replace(make=bench.nesterov)
    box = {**now.box, "1 - momentum": (0.1, 0.2)}
    monkeypatch.setitem(bench.METHODS, "SGD", now._replace(box=box))
    before = len(events)
    bench.main(words, few)
    assert events[before:][:2] == [("nesterov", 400), ("nesterov", 800)]
    kept = json.loads((tmp_path / "log.json").read_text())
    assert len(kept["trials"]) == len(kept["runs"]) == 1, "the old ones are gone"


def test_one_rule_draws_for_all():
    size = bench.Size()
    for name, (_, box) in bench.METHODS.items():
        points = bench.design(box, size)
        assert len(points) == size.trials <= 12 and points == bench.design(box, size)
        more = bench.design(box, bench.Size(trials=20))
        assert more[: size.trials] == points, "more trials keep those there are"
        for knob, (low, high) in box.items():
            values = [math.log(p[knob] / low) / math.log(high / low) for p in points]
            assert min(values) > -0.05 and max(values) < 1.05, name
            assert min(values) < 0.2 and max(values) > 0.8, name
        assert all(size.trial % p["batch"] == 0 for p in points)
    assert bench.TRIAL_SEED not in range(size.seeds)


def test_training_images_are_apart_from_those_that_judge():
    x, apart = bench.training_images(SMALL)
    assert (len(x), len(apart)) == (800, 200)
    both = torch.cat([x, apart, bench.test_images(SMALL)])
    assert len(torch.unique(both, dim=0)) == 1050 and 0 <= both.min() < both.max() <= 1


@pytest.mark.parametrize("name", bench.METHODS)
def test_every_method_learns(name):
    """At the middle of its box."""
    x, apart = bench.training_images(SMALL)
    box = bench.METHODS[name].box
    setting = {k: bench.placed(k, (a * b) ** 0.5, SMALL) for k, (a, b) in box.items()}
    run = bench.run_of(name, setting, 2400, 0, x, apart, 4)[1]
    assert run["why"] is None and run["seen"] == 2400
    assert run["curve"][-1][2] == run["validation"] < 0.6 * run["curve"][0][2]


def counted(name, setting, updates):
    """Operations an example, as a run counts them."""
    make, x = bench.METHODS[name].make, torch.rand(1000, 784)
    examples = updates * setting["batch"]
    return bench.train(make, setting, examples, 0, x, x[:10], 1)[2]


def test_operations_are_those_of_the_formulas():
    gradient = sum((4 + 2 * (l > 0)) * n * b for l, (n, a, b) in enumerate(LAYERS))
    assert bench.gradient_operations() == gradient
    sgd = counted("SGD", {"batch": 10, "rate": 0.01}, 3)
    assert sgd == gradient
    M = 1000
    setting = {"batch": M, "step": 1.0, "variance": 100.0, "clip": 2e-4}
    update = 0
    for l, (n, a, b) in enumerate(LAYERS):  # (20), as the errata page has it
        update += 4 * M * n * b + 4 * M * n * b * (l > 0) + 2 * M * a * b
        update += 2 * M * (a**2 + b**2) + 2 * a * b * (a + b) + (a**3 + b**3) / 3
        update += 24 * sum(m**2 for m in (a, b) if m > 50)  # condition numbers
    assert M * counted("natural gradient", setting, 3) == pytest.approx(update, 1e-6)


def test_operations_of_kfac():
    M, every = 200, 2
    setting = {"batch": M, "damping": 1.0, "1 - average": 0.05, "refresh": every}
    update = 0
    for l, (n, a, b) in enumerate(LAYERS):
        update += 2 * M * n * b + 4 * M * n * b * (l > 0)  # forward; back twice
        update += 2 * M * a * b + 2 * M * (a**2 + b**2) + 2 * a * b * (a + b)
        update += (a**3 + b**3) / every
        # two directions pushed forward, and a look at the loss
        update += 2 * (2 * M * a * b + 2 * M * n * b * (l > 0)) + 2 * M * n * b / every
    assert M * counted("K-FAC", setting, 5) == pytest.approx(update, 1e-6)


def test_the_quadratic_model_is_minimised():
    """The push-forward against torch's own, and the shares against the one formula for
    a single direction.
    """
    net, x = bench.autoencoder(0), torch.rand(20, 784)
    setting = {"damping": 0.5, "1 - average": 0.05, "refresh": 2}
    fisher = bench.KFAC(net, setting, 0)
    with torch.no_grad():
        H, G, d = fisher.direction(x)
        found = fisher.pushed(H, d)
        (share,), predicted = bench.minimised(fisher, H, G, [d])
        other = [torch.randn(p.shape) * p.norm() / p.numel() ** 0.5 for p in d]
        best = bench.minimised(fisher, H, G, [d, other])[1]
    params = {k: p.detach() for k, p in net.named_parameters()}
    parts = [t for p in d for t in (p[:, :-1], p[:, -1])]
    tangent = dict(zip(params, parts))
    net_of = lambda p: functional_call(net, p, (x,))  # noqa: E731
    expected = jvp(net_of, (params,), (tangent,))[1]
    assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()))
    loss = bench.ngd.optim.half_mse(net(x), x)
    slopes = torch.autograd.grad(loss, list(net.parameters()))
    slope = -sum((a * b).sum() for a, b in zip(slopes, parts))
    size = expected.square().sum() / 20 + 0.5 * sum(t.square().sum() for t in parts)
    assert share == pytest.approx(float(slope / size), 1e-4)
    assert predicted == pytest.approx(float(slope**2 / size / 2), 1e-4)
    assert best >= predicted * (1 - 1e-6)


def test_the_log_that_ships_is_of_this_script():
    """Every method with as many trials, at the points that the rule draws, and its
    long runs at the best of them.
    """
    size, kept = bench.Size(), json.loads(bench.LOG.read_text(encoding="utf8"))
    assert kept["size"] == dataclasses.asdict(size)
    for name, (_, box) in bench.METHODS.items():
        trials = [t for t in kept["trials"] if t["method"] == name]
        assert [t["setting"] for t in trials] == bench.design(box, size)
        best = min(trials, key=lambda t: t["validation"])["setting"]
        runs = [r for r in kept["runs"] if r["method"] == name]
        assert [r["seed"] for r in runs] == list(range(size.seeds))
        assert all(r["setting"] == best for r in runs)
        assert {r["code"] for r in trials + runs} == {bench.code_of(name)}
