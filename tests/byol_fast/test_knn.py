"""The weighted vote against sklearn, against a plain NumPy loop, and at its edges."""

import numpy as np
import pytest
import torch

from byol_fast.evaluate import knn


def random_task(seed: int = 0, bank: int = 300, queries: int = 80, classes: int = 7):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, 16, generator=generator)
    labels = torch.randint(classes, (bank + queries,), generator=generator)
    noise = torch.randn(bank + queries, 16, generator=generator)
    features = centres[labels] + 1.2 * noise
    return features[:bank], labels[:bank], features[bank:], labels[bank:]


def by_hand(bank, labels, queries, classes, k, temperature):
    bank, queries = bank.double().numpy(), queries.double().numpy()
    bank = bank / np.linalg.norm(bank, axis=1, keepdims=True)
    queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    guesses = []
    for similarities in queries @ bank.T:
        votes = np.zeros(classes)
        for i in np.argsort(-similarities, kind="stable")[:k]:
            votes[labels[i]] += np.exp(similarities[i] / temperature)
        guesses.append(votes.argmax())
    return np.array(guesses)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (200, 0.07), (20, 1.0)])
def test_equals_a_plain_loop(k, temperature):
    bank, labels, queries, _ = random_task()
    guesses = knn.predict(bank, labels, queries, classes=7, k=k, temperature=temperature)
    expected = by_hand(bank, labels.numpy(), queries, 7, k, temperature)
    assert guesses.numpy().tolist() == expected.tolist()


def test_equals_sklearn():
    neighbors = pytest.importorskip("sklearn.neighbors", reason="scikit-learn is not installed")
    bank, labels, queries, truth = random_task(seed=1)
    judge = neighbors.KNeighborsClassifier(
        n_neighbors=20,
        metric="cosine",
        algorithm="brute",
        weights=lambda distance: np.exp((1 - distance) / 0.07),
    ).fit(bank.numpy(), labels.numpy())
    guesses = knn.predict(bank, labels, queries, classes=7, k=20)
    assert guesses.numpy().tolist() == judge.predict(queries.numpy()).tolist()
    accuracy = knn.accuracy(bank, labels, queries, truth, classes=7, k=20)
    assert accuracy == pytest.approx(judge.score(queries.numpy(), truth.numpy()))


def test_chunks_change_nothing(monkeypatch):
    bank, labels, queries, _ = random_task(seed=2)
    whole = knn.neighbours(bank, queries, k=25)
    monkeypatch.setattr(knn, "_QUERIES", 7)
    monkeypatch.setattr(knn, "_BANK", 11)  # smaller than k
    parts = knn.neighbours(bank, queries, k=25)
    assert torch.equal(whole[1], parts[1])
    torch.testing.assert_close(whole[0], parts[0])
    assert knn.predict(bank, labels, queries, classes=7, k=25).shape == (80,)


def test_a_k_beyond_the_bank_is_the_whole_bank():
    bank, labels, queries, _ = random_task(bank=12)
    everyone = knn.predict(bank, labels, queries, classes=7, k=12)
    assert torch.equal(knn.predict(bank, labels, queries, classes=7, k=500), everyone)


def test_several_k_in_one_search_equal_one_each():
    bank, labels, queries, truth = random_task(seed=3)
    together = knn.accuracies(bank, labels, queries, truth, classes=7, ks=(5, 1, 40))
    alone = {k: knn.accuracy(bank, labels, queries, truth, classes=7, k=k) for k in (5, 1, 40)}
    assert together == alone
    assert len(set(together.values())) > 1


@pytest.mark.parametrize("block", [2, 3, 100])
def test_ties_go_to_the_lower_bank_index_and_the_lower_class(monkeypatch, block):
    monkeypatch.setattr(knn, "_BANK", block)
    bank = torch.tensor([[0.0, 1.0]] + [[1.0, 0.0]] * 6)  # six equal neighbours
    labels = torch.tensor([0, 3, 2, 2, 1, 1, 1])
    query = torch.tensor([[2.0, 0.0]])
    similarities, indices = knn.neighbours(bank, query, k=3)
    assert indices.tolist() == [[1, 2, 3]]
    assert similarities.tolist() == [[1.0, 1.0, 1.0]]
    assert knn.predict(bank, labels, query, classes=4, k=1).tolist() == [3]
    assert knn.predict(bank, labels, query, classes=4, k=2).tolist() == [2]  # 3 and 2 tie
    assert knn.predict(bank, labels, query, classes=4, k=5).tolist() == [1]  # 2 and 1 tie


def test_a_tiny_temperature_stays_finite_and_follows_the_nearest():
    bank, labels, queries, _ = random_task(seed=4)
    nearest = knn.predict(bank, labels, queries, classes=7, k=1)
    assert torch.equal(
        knn.predict(bank, labels, queries, classes=7, k=50, temperature=1e-6), nearest
    )


def test_similar_neighbours_outvote_many_distant_ones():
    bank = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]])
    labels, query = torch.tensor([1, 0, 0]), torch.tensor([[1.0, 0.0]])
    assert knn.predict(bank, labels, query, classes=2, k=3, temperature=0.07).tolist() == [1]
    assert knn.predict(bank, labels, query, classes=2, k=3, temperature=10.0).tolist() == [0]


def test_the_caller_s_matmul_precision_comes_back():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        bank, labels, queries, _ = random_task()
        knn.predict(bank, labels, queries, classes=7)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bank_labels": torch.tensor([0, -1])}, "-1 marks an image without a label"),
        ({"bank_labels": torch.tensor([0, 2])}, r"must lie in \[0, 2\)"),
        ({"bank_labels": torch.tensor([0])}, "need one each"),
        ({"queries": torch.ones(1, 3)}, "must be"),
        ({"k": 0}, "k must be >= 1"),
        ({"temperature": 0.0}, "temperature > 0"),
    ],
)
def test_mistakes_are_named(change, message):
    task = {
        "bank": torch.eye(2),
        "bank_labels": torch.tensor([0, 1]),
        "queries": torch.ones(1, 2),
        "classes": 2,
    }
    with pytest.raises(ValueError, match=message):
        knn.predict(**{**task, **change})


@pytest.mark.gpu
def test_gpu_equals_cpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    bank, labels, queries, _ = random_task(seed=5)
    on_cpu = knn.predict(bank, labels, queries, classes=7)
    assert torch.equal(knn.predict(bank, labels, queries, classes=7, device="cuda"), on_cpu)


def test_votes_of_large_class_numbers_take_no_memory():
    """A column for each number would be 1.4 TB here."""
    bank, labels, queries, _ = random_task()
    numbers = torch.tensor([5, 70, 71, 900_000, 10**9, 2 * 10**9, 2 * 10**9 + 1])
    plain = knn.predict(bank, labels, queries, classes=7)
    large = knn.predict(bank, numbers[labels], queries, classes=2 * 10**9 + 2)
    assert torch.equal(large, numbers[plain])
