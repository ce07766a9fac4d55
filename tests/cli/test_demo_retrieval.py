"""`tigon demo --token-reduction`: its task, its methods, its statistics, and all of it in little."""

from dataclasses import replace

import pytest
import torch

from tigon.cli import demo_retrieval, demo_retrieval_eval, demo_retrieval_train, main
from tigon.cli.demo_retrieval_eval import AVERAGES, Result
from tigon.cli.demo_retrieval_task import (
    FIRST_FILLER,
    FIRST_POINTER,
    FIRST_VALUE,
    FRAME,
    VOCABULARY,
    draw,
)
from tigon.models import HybridLM


def drawn(batch: int, chains: int, questions: int, seed: int = 0):
    return draw(batch, chains, questions, torch.Generator().manual_seed(seed))


def model_and_batch():
    torch.manual_seed(0)
    return HybridLM(demo_retrieval_train.config()).eval(), drawn(2, 12, 3)


def test_demo_trains_measures_every_method_and_names_winners(tmp_path, capsys):
    args = ["demo", "--token-reduction", "--steps", "2", "--queries", "4", "--out", str(tmp_path)]
    assert main(args) == 0
    out = capsys.readouterr().out
    for part in (
        "progressive, both scores",
        "one-shot early (FastV)",
        "stages (PyramidDrop)",
        "random",
        "query-free (EVS)",
        "recall of the needle",
        "below 95 %",
        "winner at 50 %",
        "winner at 25 %",
        "winner at 12.5 %",
    ):
        assert part in out
    assert (tmp_path / "token_reduction.png").stat().st_size > 1000


def test_an_answer_takes_both_records_and_no_frame_holds_a_key_with_its_value():
    batch = drawn(3, 7, 4)
    for row in range(3):
        frames = batch.ids[row, : batch.visual].view(-1, FRAME).tolist()
        records = dict(frame[1:] for frame in frames)
        questions = batch.ids[row, batch.visual :].tolist()
        assert len(records) == 14 and len(set(questions)) == 4
        for key, pointer, value in zip(
            questions, batch.pointers[row].tolist(), batch.values[row].tolist(), strict=True
        ):
            assert key < FIRST_POINTER <= pointer < FIRST_VALUE <= value < FIRST_FILLER
            assert records[key] == pointer and records[pointer] == value
            assert not [frame for frame in frames if key in frame and value in frame]
        assert all(FIRST_FILLER <= frame[0] < VOCABULARY for frame in frames)


def test_needles_are_the_frames_of_a_questions_records_and_their_repeats():
    batch = drawn(3, 7, 4)
    frames = batch.ids[:, : batch.visual].view(3, -1, FRAME)
    keys = batch.ids[:, batch.visual :]
    for hop, (asked, told) in enumerate(
        ((keys, batch.pointers), (batch.pointers, batch.values)),
    ):
        same = (frames[:, None, :, 1] == asked[..., None]) & (
            frames[:, None, :, 2] == told[..., None]
        )
        assert torch.equal(batch.needles[:, :, hop], same)
        places = batch.needle_tokens(hop)
        assert torch.equal(places.sum(-1), same.sum(-1))
        assert (
            (batch.ids[:, None, : batch.visual].expand_as(places)[places]).tolist()
            == (told[..., None].expand_as(same)[same]).tolist()
        )


def test_a_third_as_many_frames_repeat_the_one_before_and_no_record_is_left_out():
    frames = drawn(4, 9, 1).ids[:, :-1].view(4, -1, FRAME)
    assert frames.shape[1] == 24  # 18 records
    again = (frames[:, 1:] == frames[:, :-1]).all(-1)
    assert again.sum(1).tolist() == [6] * 4
    for row in frames:
        assert len({tuple(frame[1:]) for frame in row.tolist()}) == 18


def test_a_task_that_cannot_be_drawn_is_refused():
    for chains, questions in ((3, 4), (33, 1), (4, 0)):
        with pytest.raises(ValueError, match="questions="):
            drawn(1, chains, questions)


def test_intervals_are_those_of_wilson():
    # The two classic examples of Newcombe 1998, table I.
    assert demo_retrieval_eval.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert demo_retrieval_eval.wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert demo_retrieval_eval.wilson(20, 20) == pytest.approx((1 - 0.1611, 1.0), abs=1e-4)


@torch.no_grad()
def test_the_whole_model_in_the_table_is_the_model_without_reduction():
    model, batch = model_and_batch()
    said = model(batch.ids)[:, batch.visual :].argmax(-1)
    for values, right in ((said, 6), (said + 1, 0)):
        found = demo_retrieval_eval.measure(model, [replace(batch, values=values)], None)
        assert (found.right, found.asked) == (right, 6)
    assert found.average == 1 and (found.kept == 1).all()


def test_every_method_spends_the_average_that_was_asked_for():
    model, batch = model_and_batch()
    for average in AVERAGES:
        methods = demo_retrieval_eval.methods(model, average, 0)
        assert len(methods) == (7 if average == 0.125 else 8)
        for name, method in methods.items():
            found = demo_retrieval_eval.measure(model, [batch], method)
            # A count is rounded up by layer: of 96 tokens, up to one in a layer.
            assert average - 0.006 < found.average < average + 0.011, name
            assert ((found.kept[1:] - found.kept[:-1]) <= 0).all()


def test_a_needle_counts_as_kept_where_a_copy_of_its_token_is():
    model, batch = model_and_batch()
    needles = batch.needle_tokens(0).any(1)
    found = demo_retrieval_eval.measure(
        model, [batch], lambda _: (demo_retrieval_eval.WHOLE, needles)
    )
    assert (found.kept[:, 0] == 1).all() and (found.kept[:, 1] == 0).all()
    found = demo_retrieval_eval.measure(
        model, [batch], lambda _: (demo_retrieval_eval.WHOLE, ~needles)
    )
    assert (found.kept[:, 0] == 0).all() and (found.kept[:, 1] == 1).all()


@torch.no_grad()
def test_scores_of_a_row_are_those_it_has_alone():
    model, batch = model_and_batch()
    seen: list[tuple] = []
    h = model.backbone.embeddings(batch.ids)
    for layer in model.backbone.layers[:2]:
        h = layer(h, watch=lambda *tensors: seen.append(tensors))
    for inner in seen:
        both = demo_retrieval_eval._scores(batch, *inner)
        alone = drawn(2, 12, 3)
        for row in range(2):
            one = type(alone)(*(t[row : row + 1] for t in vars(alone).values()))
            single = demo_retrieval_eval._scores(one, *(t[row : row + 1] for t in inner))
            torch.testing.assert_close(both[row], single[0])
    assert both.sum(1).max() < 1  # softmax weights, some of them on the questions


def test_recall_is_given_for_every_mixer_and_is_a_share():
    model, batch = model_and_batch()
    recall = demo_retrieval_eval.needle_recall(model, [batch])
    assert list(recall) == [l for l, kind in enumerate(model.config.pattern) if kind in "M*"]
    shares = torch.stack(list(recall.values()))
    assert shares.shape == (len(recall), 2) and ((shares >= 0) & (shares <= 1)).all()


def result(right: int) -> Result:
    return Result(right, 100, 0.5, torch.ones(1, 2))


def test_the_verdict_names_the_winner_whoever_it_is_and_who_is_not_told_apart():
    found = {
        "ours": {a: result(50) for a in AVERAGES},
        "random": {a: result(70) for a in AVERAGES},
        "close": {0.5: result(65)},
        "even": {0.25: result(70)},
    }
    lines = demo_retrieval.verdict(result(99), found)
    assert lines[0].startswith("winner at 50 %: random, 70.0 (") and lines[0].endswith("close")
    assert "random and even, 70.0" in lines[1]
    assert "close" not in lines[1] and "ours" not in lines[1]
    assert len(lines) == 3
    assert "below 95 %" in demo_retrieval.verdict(result(94), found)[0]


def test_training_by_steps_is_reproducible_and_the_length_follows_the_answers(monkeypatch):
    histories = []
    for enough in (2.0, 2.0, -1.0):
        monkeypatch.setattr(demo_retrieval_train, "ENOUGH", enough)
        torch.manual_seed(0)
        model = HybridLM(demo_retrieval_train.config())
        histories.append(demo_retrieval_train.train(model, seconds=0, steps=3))
    assert histories[0].right == histories[1].right
    assert histories[0].chains == [6, 6, 6] and histories[2].chains == [6, 12, 32]


def test_the_lessons_show_where_to_look(monkeypatch):
    model, batch = model_and_batch()
    shown, right = demo_retrieval_train._loss(model, batch)
    monkeypatch.setattr(demo_retrieval_train, "HOPS", ())
    plain, same = demo_retrieval_train._loss(model, batch)
    # Two attentions near 1 / 99 and a guess among symbols.
    assert right == same and shown > plain + 3
    logits = model(batch.ids)[:, batch.visual :].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, batch.values.flatten())
    torch.testing.assert_close(plain, expected)
