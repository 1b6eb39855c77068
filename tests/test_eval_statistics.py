"""Standard errors and paired tests."""

import math

import numpy as np
import pytest

from eval.statistics import bootstrap_p, estimate, mcnemar, mean_metric, mean_of_means, paired, ratio_metric


def singles(count):
    return [str(i) for i in range(count)]


def test_the_error_of_a_mean_is_the_textbooks():
    scores = np.random.default_rng(0).random(200)
    value, error = estimate(mean_metric("m", scores), singles(200))
    assert value == pytest.approx(scores.mean())
    assert error == pytest.approx(scores.std(ddof=1) / math.sqrt(200))


def test_rows_that_do_not_count_do_not_lower_the_error():
    scores, among = np.random.default_rng(0).random(300), np.arange(300) < 200
    assert estimate(mean_metric("m", scores, among), singles(300)) == pytest.approx(
        estimate(mean_metric("m", scores[:200]), singles(200))
    )


def test_questions_about_the_same_image_count_as_one():
    """Every row four times: the error is that of the rows once, and half of it if all rows were taken as separate."""
    scores = np.random.default_rng(0).random(100)
    once = estimate(mean_metric("m", scores), singles(100))[1]
    metric = mean_metric("m", np.repeat(scores, 4))
    assert estimate(metric, np.repeat(singles(100), 4).tolist())[1] == pytest.approx(once)
    assert estimate(metric, singles(400))[1] == pytest.approx(once / 2, rel=0.02)


def test_the_error_of_a_ratio_and_of_a_mean_of_means_is_what_repeating_shows():
    rng = np.random.default_rng(1)

    def drawn():
        scores = (rng.random(300) < 0.4).astype(float)
        labels = ["a" if i < 200 else "b" for i in range(300)]
        above = (rng.random(300) < 0.5) * scores
        return mean_of_means("m", scores, labels), ratio_metric("r", above, scores)

    for which in (0, 1):
        found = [estimate(drawn()[which], singles(300)) for _ in range(400)]
        spread = np.std([value for value, _ in found])
        assert np.mean([error for _, error in found]) == pytest.approx(spread, rel=0.12)


def test_a_mean_of_means_weighs_each_label_the_same():
    metric = mean_of_means("m", [1, 1, 1, 0], ["a", "a", "a", "b"])
    assert estimate(metric, singles(4))[0] == 0.5
    assert estimate(mean_of_means("m", [1, 0], ["a", None]), singles(2))[0] == 1.0


def test_a_number_of_no_row_is_none_and_of_one_has_no_error():
    assert estimate(mean_metric("m", [1.0], np.array([False])), singles(1)) == (None, None)
    assert estimate(mean_metric("m", [1.0]), singles(1)) == (1.0, None)


@pytest.mark.parametrize(("first", "second", "p"), [(0, 0, 1.0), (5, 5, 1.0), (0, 6, 0.03125), (1, 9, 0.021484375)])
def test_mcnemar(first, second, p):
    """Twice the binomial tail: scipy.stats.binomtest(min, sum) gives these."""
    assert mcnemar(first, second) == pytest.approx(p)
    assert mcnemar(second, first) == pytest.approx(p)


def test_the_two_tests_agree_on_plain_rows():
    rng = np.random.default_rng(2)
    first, second = ((rng.random(500) < p).astype(float) for p in (0.40, 0.47))
    pair = mean_metric("m", first), mean_metric("m", second)
    found = paired(*pair, singles(500))
    assert found["test"].startswith("McNemar")
    assert found["difference"] == pytest.approx(second.mean() - first.mean())
    assert found["stderr"] == pytest.approx((second - first).std(ddof=1) / math.sqrt(500))
    assert found["low"] < found["difference"] < found["high"]
    assert bootstrap_p(*pair, singles(500)) == pytest.approx(found["p"], rel=0.35)


def test_shared_images_are_drawn_together():
    """Forty copies of five images say no more than the five."""
    first, second = np.repeat([0.0, 0.0, 0.0, 0.0, 1.0], 40), np.repeat([1.0, 1.0, 0.0, 0.0, 0.0], 40)
    images = np.repeat(list("abcde"), 40).tolist()
    found = paired(mean_metric("m", first), mean_metric("m", second), images)
    assert found["test"] == "paired bootstrap"
    assert found["p"] > 0.3
    assert paired(mean_metric("m", first), mean_metric("m", second), singles(200))["p"] < 0.01


def test_no_difference_is_found_where_there_is_none_about_as_often_as_p_says():
    rng, found = np.random.default_rng(3), []
    for _ in range(60):
        first, second = (rng.random(120) for _ in range(2))
        found.append(bootstrap_p(mean_metric("m", first), mean_metric("m", second), singles(120)))
    assert 0 <= sum(p < 0.05 for p in found) <= 9
    assert 0.3 < np.mean(found) < 0.7


def test_the_same_answers_differ_in_nothing():
    metric = mean_of_means("m", [1, 0, 1, 0], list("aabb"))
    found = paired(metric, metric, singles(4))
    assert (found["difference"], found["p"]) == (0.0, 1.0)
