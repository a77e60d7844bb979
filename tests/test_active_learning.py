"""The functions of ``active_learning.py``, on data that its page does not show."""

import pytest
import torch
from sklearn.datasets import load_wine
from torch import nn
from torch.testing import assert_close


@pytest.fixture(scope="module")
def names(taught):
    return taught("use/active_learning")


@pytest.fixture(autouse=True)
def reproducible():
    before = torch.get_default_dtype()
    torch.manual_seed(5)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def wine(N):
    data = torch.tensor(load_wine().data)[torch.randperm(178)[:N]]
    return (data - data.mean(0)) / data.std(0)


def network():
    return nn.Sequential(nn.Linear(13, 5), nn.Tanh(), nn.Linear(5, 3))


def test_fisher_rows_are_expected_squares_of_the_score(names):
    X, model = wine(7), network()
    model[0].bias.requires_grad_(False)
    rows = names["fisher_rows"](model, X)
    params = [p for p in model.parameters() if p.requires_grad]
    P = sum(p.numel() for p in params)
    assert rows.shape == (7, 3, P)
    for n, x in enumerate(X):
        logs = model(x[None])[0].log_softmax(0)
        fisher = torch.zeros(P, P)
        for log in logs:
            grads = torch.autograd.grad(log, params, retain_graph=True)
            score = torch.cat([g.flatten() for g in grads])
            fisher += log.detach().exp() * torch.outer(score, score)
        assert_close(rows[n].T @ rows[n], fisher)
    assert all(p.grad is None for p in model.parameters())


def brute_force(rows, known, count, prior):
    """Return the greedy choice, each time with the whole determinant."""

    def information(indices):
        fisher = sum(rows[n].T @ rows[n] for n in indices)
        return torch.logdet(prior * torch.eye(rows.shape[2]) + fisher)

    chosen = list(known)
    for _ in range(count):
        rest = [n for n in range(len(rows)) if n not in chosen]
        chosen.append(max(rest, key=lambda n: information([*chosen, n])))
    return chosen[len(known) :]


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("prior", [0.1, 1.0, 20.0])
@pytest.mark.parametrize("known", [[], [2], [0, 7, 4, 11]])
def test_choice_is_that_of_brute_force(names, known, prior, seed):
    torch.manual_seed(seed)
    rows = names["fisher_rows"](network(), wine(19))
    chosen, inverse = names["most_informative"](rows, known, 6, prior)
    assert chosen == brute_force(rows, known, 6, prior)
    seen = rows[known + chosen].flatten(0, 1)
    fresh = torch.linalg.inv(prior * torch.eye(rows.shape[2]) + seen.T @ seen)
    assert_close(inverse, fresh)


def test_prior_matters(names):
    torch.manual_seed(1)
    rows = names["fisher_rows"](network(), wine(19))
    choices = [names["most_informative"](rows, [], 6, p)[0] for p in (1e-3, 1e3)]
    assert choices[0] != choices[1]


def test_one_output_needs_one_row(names):
    rows = torch.randn(9, 1, 4)
    chosen, _ = names["most_informative"](rows, [3], 5)
    assert chosen == brute_force(rows, [3], 5, 1.0)


def test_twin_is_taken_late(names):
    rows = torch.diag(torch.tensor([3.0, 2.0, 1.0]))[:, None]
    rows = torch.cat([rows, 0.999 * rows[:1]])  # sample 3 is nearly sample 0
    assert names["most_informative"](rows, [], 3)[0] == [0, 1, 2]
    best_at_once = rows.square().sum((1, 2)).topk(3).indices.tolist()
    assert 3 in best_at_once


def test_all_are_chosen_once_and_no_more(names):
    rows = torch.randn(6, 2, 5)
    chosen, _ = names["most_informative"](rows, [1], 5)
    assert sorted(chosen) == [0, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="count = 6, but only 5 of 6 are left"):
        names["most_informative"](rows, [1], 6)


def test_float32_chooses_the_same(names):
    rows = names["fisher_rows"](network(), wine(19))
    chosen, _ = names["most_informative"](rows, [0, 5], 4)
    single, inverse = names["most_informative"](rows.float(), [0, 5], 4)
    assert single == chosen
    assert inverse.dtype == torch.float64


def test_strategies_choose_what_has_no_label(names):
    X = torch.rand(50, 64)
    model = nn.Sequential(nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 10))
    known = list(range(0, 50, 3))
    for strategy in names["strategies"]:
        chosen = strategy(model, X, known)
        assert len(set(chosen)) == 10
        assert not set(chosen) & set(known)


def test_margin_is_between_the_two_most_probable(names):
    probabilities = torch.tensor([0.4, 0.35, 0.25]).repeat(30, 1)
    lead = torch.linspace(0, 0.2, 30)[torch.randperm(30)]
    probabilities[:, 0] += lead
    probabilities[:, 2] -= lead
    chosen = names["smallest_margins"](nn.Identity(), probabilities.log(), [])
    assert chosen == lead.argsort()[:10].tolist()


def test_information_beats_random_labels_on_other_seeds(names):
    pairs = [
        [names["campaign"](names[s], seed)[-1] for seed in (100, 101, 102)]
        for s in ("random_labels", "most_information")
    ]
    random, information = torch.tensor(pairs)
    assert information.mean() > random.mean()


def test_the_universal_jacobian_takes_the_place_of_the_recipe(names, taught):
    X, model = wine(7), network()
    batched_jacobian = taught("scale/universal_jacobian")["batched_jacobian"]
    assert_close(dict(batched_jacobian(model, X)), names["vmap_jacrev"](model, X))


def test_ntk_holds_the_inner_products_of_the_rows(names, taught):
    X, model = wine(7), network()
    p = model(X).detach().softmax(1)
    weigh = p.sqrt()[..., None] * (torch.eye(3) - p[:, None])  # [N, C, C]
    K = taught("scale/neural_tangent_kernel")["ntk"](model, X)
    products = torch.einsum("nab,nbmd,mcd->namc", weigh, K, weigh)
    rows = names["fisher_rows"](model, X)
    assert_close(products, torch.einsum("nap,mcp->namc", rows, rows))


def test_rows_in_float32_give_the_same_choice(names):
    X, model = 30 * wine(60), network()
    rows = names["fisher_rows"](model, X)
    chosen, _ = names["most_informative"](rows, [0, 1, 2], 8, 1e-6)
    single, inverse = names["most_informative"](rows.float(), [0, 1, 2], 8, 1e-6)
    assert single[:4] == chosen[:4] and inverse.dtype == torch.float64


class Keeps(nn.Linear):
    def forward(self, X):
        self.kept = super().forward(X)
        return self.kept


def test_a_kept_tensor_and_hooks_stay_and_change_nothing(names):
    model, X = (
        nn.Sequential(Keeps(13, 5), nn.Tanh(), nn.Linear(5, 3)).double(),
        torch.randn(15, 13).double(),
    )

    def result():
        return names["fisher_rows"](model, X)

    plain = result()
    model(X)
    kept = model[0].kept
    hook = model[2].register_full_backward_hook(lambda layer, to, of: (7 * to[0],))
    assert_close(result(), plain)
    assert model[0].kept is kept and hook.id in model[2]._backward_hooks
