import pytest

from byol_fast.schedules import learning_rate, target_decay

HUNDRED = {"peak": 7.2, "warmup_steps": 3127, "total_steps": 31278}  # 0.45 × 4096 / 256
THOUSAND = {"peak": 3.2, "warmup_steps": 3127, "total_steps": 312784}  # 0.2 × 4096 / 256


@pytest.mark.parametrize(
    ("step", "recipe", "value"),
    [
        (0, HUNDRED, 0.0),
        (100, HUNDRED, 0.2302526),
        (3127, HUNDRED, 7.2),
        (15639, HUNDRED, 4.2249576),
        (31278, HUNDRED, 0.0),
        (40000, HUNDRED, 0.0),
        (156392, THOUSAND, 1.6253787),
    ],
)
def test_learning_rate_golden(step, recipe, value):
    assert learning_rate(step, **recipe) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(
    ("step", "base", "total", "value"),
    [
        (0, 0.99, 31278, 0.99),
        (15639, 0.99, 31278, 0.995),
        (156392, 0.996, 312784, 0.998),
        (31278, 0.99, 31278, 1.0),
        (40000, 0.99, 31278, 1.0),
    ],
)
def test_target_decay_golden(step, base, total, value):
    assert target_decay(step, base=base, total_steps=total) == pytest.approx(value, abs=1e-6)


def test_monotone_where_it_should_be():
    lr = [learning_rate(s, peak=1.0, warmup_steps=10, total_steps=50) for s in range(51)]
    assert lr[:11] == sorted(lr[:11]) and lr[10:] == sorted(lr[10:], reverse=True)
    tau = [target_decay(s, base=0.9, total_steps=50) for s in range(51)]
    assert tau == sorted(tau)


def test_no_warmup_and_nothing_but_warmup():
    assert learning_rate(0, peak=2.0, warmup_steps=0, total_steps=10) == 2.0
    assert learning_rate(5, peak=2.0, warmup_steps=10, total_steps=10) == 1.0
    assert learning_rate(10, peak=2.0, warmup_steps=10, total_steps=10) == 0.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: learning_rate(-1, peak=1.0, warmup_steps=0, total_steps=1), "step"),
        (lambda: learning_rate(0, peak=1.0, warmup_steps=5, total_steps=4), "warmup_steps"),
        (lambda: learning_rate(0, peak=1.0, warmup_steps=0, total_steps=0), "total_steps"),
        (lambda: target_decay(0, base=1.1, total_steps=1), "base"),
    ],
)
def test_impossible_lengths_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
