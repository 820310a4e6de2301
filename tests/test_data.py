"""Data in every form it may have gives the same model the same numbers."""

from __future__ import annotations

import datasets
import pytest
import tiny
import torch
import transformers
import zoo
from everyday import everyday
from hypothesis import given, settings
from hypothesis import strategies as st

import sat_lens as sl
from sat_lens.data import batches, predicts_next, text_windows
from sat_lens.errors import DataError

TEXTS = ["import os", "x = 1 + 2 + 3\n", "def f(x):\n    return x"]
SEQUENCES = st.lists(st.integers(3, 2047), min_size=1, max_size=24)


def refusal(*words):
    assert issubclass(DataError, sl.SatLensError)
    assert issubclass(DataError, ValueError)
    return pytest.raises(DataError, match="(?s)" + "".join(f"(?=.*{word})" for word in words))


def read(model, data, **kwargs):
    return list(batches(model, data, **kwargs))


def logits_of(model, batch):
    with torch.no_grad():
        return batch.run(model)


def ids(model, text):
    return model.tokenizer(text)["input_ids"]


def same_batches(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.inputs, other.inputs)
        assert one.kwargs.keys() == other.kwargs.keys()
        assert all(torch.equal(one.kwargs[name], other.kwargs[name]) for name in one.kwargs)


@settings(max_examples=15)
@given(st.lists(SEQUENCES, min_size=2, max_size=4))
def test_padding_changes_no_logit_at_a_real_position(demo, rows):
    padded = read(demo, [{"input_ids": row} for row in rows])
    assert [batch.size for batch in padded] == [len(rows)]
    logits = logits_of(demo, padded[0])
    for i, row in enumerate(rows):
        assert padded[0].non_padding[i].tolist() == [j < len(row) for j in range(logits.shape[1])]
        alone = logits_of(demo, read(demo, torch.tensor([row]))[0])[0]
        torch.testing.assert_close(logits[i, : len(row)], alone, rtol=1e-4, atol=1e-4)


@given(rows=st.integers(1, 9), batch_size=st.integers(1, 10))
def test_a_tensor_is_cut_into_batches_and_nothing_is_lost(demo, rows, batch_size):
    tokens = torch.arange(rows * 3).reshape(rows, 3)
    found = read(demo, tokens, batch_size=batch_size)
    assert torch.equal(torch.cat([batch.inputs for batch in found]), tokens)
    assert [batch.size for batch in found[:-1]] == [batch_size] * (len(found) - 1)
    assert all(torch.equal(batch.tokens, batch.inputs) for batch in found)


@settings(max_examples=25)
@given(n=st.integers(1, 7), batch_size=st.integers(1, 8))
def test_texts_come_in_order_in_batches(demo, n, batch_size):
    texts = [f"x{i} = {i}" for i in range(n)]
    found = read(demo, (text for text in texts), batch_size=batch_size)
    assert [batch.size for batch in found[:-1]] == [batch_size] * (len(found) - 1)
    rows = [
        row[keep].tolist() for b in found for row, keep in zip(b.tokens, b.non_padding, strict=True)
    ]
    assert rows == [ids(demo, text) for text in texts]


def test_texts_open_with_the_beginning_of_sequence_once(demo):
    bos = demo.tokenizer.bos_token_id
    (batch,) = read(demo, "import os")
    assert (batch.tokens == bos).nonzero().tolist() == [[0, 0]]
    assert batch.kwargs == {}
    assert torch.equal(batch.tokens, demo.to_tokens("import os"))


def test_a_long_text_is_cut_to_the_context(demo):
    (batch,) = read(demo, ["x = 1\n" * 999])
    assert batch.inputs.shape == (1, demo.cfg.n_ctx)


def test_what_is_cut_off_is_said_once(demo, caplog):
    context = demo.cfg.n_ctx
    rows = [[0] * (context + 5), [0] * context, [0] * (context + 7)]
    data = [{"input_ids": row} for row in rows] * 2
    found = read(demo, data, batch_size=2)
    assert [batch.inputs.shape for batch in found] == [(2, context)] * 3
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "4 of the texts" in record.message
    assert "24 tokens" in record.message
    caplog.clear()
    read(demo, TEXTS)
    next(batches(demo, ["x = 1\n" * 999, "y"], batch_size=1))
    assert len(caplog.records) == 1


def test_all_forms_of_the_same_tokens_agree(demo):
    tokens = torch.tensor([ids(demo, TEXTS[0])])
    forms = [
        tokens,
        tokens[0],
        [tokens],
        [tokens[0]],
        TEXTS[0],
        TEXTS[:1],
        [{"input": tokens}],
        [{"input_ids": tokens}],
        [{"tokens": tokens[0]}],
        [{"text": TEXTS[0]}],
        [{"input_ids": tokens[0].tolist()}],
    ]
    expected = read(demo, tokens)
    for form in forms:
        same_batches(read(demo, form), expected)


def test_a_dict_passes_the_models_own_arguments_on(demo):
    tokens = torch.tensor([[0, 5, 6], [0, 7, 2]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    (batch,) = read(demo, [{"input": tokens, "attention_mask": mask, "use_cache": False}])
    assert batch.non_padding.tolist() == [[True] * 3, [True, True, False]]
    assert batch.kwargs["use_cache"] is False
    assert torch.equal(logits_of(demo, batch), demo(tokens, attention_mask=mask).detach())


def test_a_dict_says_what_a_decoder_reads():
    case = tiny.pair("bart", "Bart", tiny.BART)
    (tokens,), extra = case.inputs()
    mask = torch.ones_like(extra["decoder_input"])
    item = {"input": tokens, **extra, "decoder_attention_mask": mask}
    (batch,) = read(case.build(), [item])
    assert torch.equal(batch.decoder_tokens, extra["decoder_input"])
    assert batch.decoder_non_padding.all()
    assert batch.non_padding is None


def test_images_are_no_tokens():
    size = {"image_size": 16, "patch_size": 4}
    model = tiny.reader(
        "vit", "ViTForImageClassification", "ViTConfig", "softmax", settings=tiny.SIZE | size
    ).build()
    images = tiny.noise(5, 3, 16, 16)
    found = read(model, images, batch_size=2)
    assert [batch.size for batch in found] == [2, 2, 1]
    assert all(batch.tokens is None for batch in found)


def test_forms_may_be_mixed_and_keep_their_order(demo):
    tokens = torch.tensor([[0, 5, 6]])
    found = read(demo, [TEXTS[0], tokens, TEXTS[1], {"input": tokens}], batch_size=8)
    starts = [batch.inputs[0, :3].tolist() for batch in found]
    assert starts == [ids(demo, TEXTS[0])[:3], [0, 5, 6], ids(demo, TEXTS[1])[:3], [0, 5, 6]]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_dataset_with_a_text_column_reads_like_its_texts(demo, streamed):
    whole = datasets.Dataset.from_dict({"text": TEXTS, "id": [1, 2, 3]})
    dataset = whole.to_iterable_dataset() if streamed else whole
    same_batches(read(demo, dataset, batch_size=2), read(demo, TEXTS, batch_size=2))


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_tokenised_dataset_reads_like_its_texts(demo, streamed, side):
    rows = [ids(demo, text) for text in TEXTS]
    width = max(map(len, rows))
    columns = {"input_ids": [], "attention_mask": []}
    for row in rows:
        filling = [demo.tokenizer.pad_token_id] * (width - len(row))
        real, padding = [1] * len(row), [0] * len(filling)
        left = side == "left"
        columns["input_ids"].append(filling + row if left else row + filling)
        columns["attention_mask"].append(padding + real if left else real + padding)
    dataset = datasets.Dataset.from_dict(columns)
    dataset = dataset.to_iterable_dataset() if streamed else dataset
    same_batches(read(demo, dataset), read(demo, TEXTS))


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("column", ["input_ids", "tokens", "input"])
@pytest.mark.parametrize("kind", [None, "torch"])
def test_a_dataset_of_tokens_is_read_in_batches(demo, streamed, column, kind):
    dataset = datasets.Dataset.from_dict({column: [ids(demo, text) for text in TEXTS]})
    dataset = dataset.to_iterable_dataset() if streamed else dataset
    found = read(demo, dataset.with_format(kind), batch_size=2)
    same_batches(found, read(demo, TEXTS, batch_size=2))


@pytest.mark.parametrize("columns", [("text",), ("input_ids", "attention_mask"), ("tokens",)])
def test_batches_of_a_dataset_are_read_one_by_one(demo, columns):
    made = {
        "text": TEXTS,
        "input_ids": [[*ids(demo, text), 2] for text in TEXTS],
        "attention_mask": [[1] * len(ids(demo, text)) + [0] for text in TEXTS],
        "tokens": [ids(demo, text) for text in TEXTS],
    }
    dataset = datasets.Dataset.from_dict({name: made[name] for name in columns})
    same_batches(read(demo, dataset.iter(2)), read(demo, TEXTS))


def test_what_a_tokenizer_gives_is_a_batch(demo):
    encoded = demo.tokenizer(TEXTS, padding=True)
    same_batches(read(demo, [encoded]), read(demo, TEXTS))
    tensors = demo.tokenizer(TEXTS, padding=True, return_tensors="pt")
    (batch,) = read(demo, [{n: tensors[n] for n in ("input_ids", "attention_mask")}])
    assert torch.equal(batch.inputs, read(demo, TEXTS)[0].inputs)


def test_a_tensor_with_more_beside_it_than_a_mask_stays_a_batch_of_its_own(demo):
    items = [{"input_ids": torch.tensor([0, 5, 6]), "use_cache": False}] * 2
    found = read(demo, items)
    assert [batch.kwargs for batch in found] == [{"use_cache": False}] * 2


def test_one_sequence_for_an_encoder_and_a_decoder_is_a_batch_of_one():
    model = tiny.pair("bart", "Bart", tiny.BART).build()
    item = {"input": tiny.tokens(1, 9)[0], "decoder_input": tiny.tokens(1, 7, seed=1)[0]}
    (batch,) = read(model, [item])
    assert logits_of(model, batch).shape[:2] == (1, 7)
    assert batch.decoder_tokens.shape == (1, 7)


def test_several_datasets_at_once_are_refused(demo):
    whole = datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": TEXTS}))
    with refusal("choose one", r"data\['train'\]", "found DatasetDict"):
        read(demo, whole)
    numbers = datasets.Dataset.from_dict({"input_ids": [[5, 6]]}).with_format("numpy")
    with refusal("as a tensor", "input_ids is a ndarray"):
        read(demo, numbers)


def test_a_stream_is_read_no_further_than_it_is_needed(demo):
    def endless():
        while True:
            yield {"text": "import os"}

    stream = batches(demo, endless(), batch_size=4)
    assert [next(stream).size for _ in range(3)] == [4, 4, 4]


@pytest.mark.parametrize("streamed", everyday([False, True], True))
@pytest.mark.parametrize("column", everyday(["text", "input_ids", "tokens"], "input_ids"))
def test_roles_take_a_dataset(demo, streamed, column):
    texts = ["import os, sys, re, json, math, itertools", "for x in range(10): print(x, x ** 2)"]
    rows = texts if column == "text" else [ids(demo, text) for text in texts]
    dataset = datasets.Dataset.from_dict({column: rows, "id": [1, 2]})
    dataset = dataset.to_iterable_dataset() if streamed else dataset
    found = sl.head_roles(demo, dataset, progress=False).frame()
    expected = sl.head_roles(demo, texts, progress=False).frame()
    assert found.equals(expected)


def test_a_model_without_tokenizer_reads_tokens_only():
    model = tiny.native()
    (batch,) = read(model, [{"input_ids": [5, 6]}, {"input_ids": [7]}])
    assert batch.non_padding.tolist() == [[True, True], [True, False]]
    with refusal("no tokenizer", "token tensors"):
        read(model, "a text")


@pytest.mark.parametrize("empty", [[], iter([]), datasets.Dataset.from_dict({"text": []})])
def test_empty_data(demo, empty):
    with refusal("empty", "at least one sequence"):
        read(demo, empty)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0,)])
def test_an_empty_tensor(demo, shape):
    with refusal("holds nothing"):
        read(demo, torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("texts", ["", " \n", ["import os", ""], [{"text": ""}]])
def test_an_empty_text(demo, texts):
    with refusal("texts is empty", "text_windows"):
        read(demo, texts)


@pytest.mark.parametrize(
    "item",
    [{"input_ids": []}, {"input_ids": [5, 6], "attention_mask": [0, 0]}],
)
def test_a_sequence_without_tokens(demo, item):
    with refusal("no token"):
        read(demo, [{"input_ids": [5]}, item])


def test_a_mask_of_another_length(demo):
    with refusal("one mask entry per token", "1 for 2"):
        read(demo, [{"input_ids": [5, 6], "attention_mask": [1]}])


@pytest.mark.parametrize("data", [5, None, [5], [["import os"]], {"text": "import os"}, b"bytes"])
@pytest.mark.usefixtures("types_unchecked")
def test_what_is_no_data(demo, data):
    with refusal("token tensor", "list of texts", "found (int|NoneType|list|dict)"):
        read(demo, data)


@pytest.mark.parametrize("wrong", [torch.ones(2, 3), torch.ones(2, 3).bool(), torch.ones(3)])
def test_tokens_are_whole_numbers(demo, wrong):
    for data in (wrong, [wrong], [{"input_ids": wrong}]):
        with refusal("whole numbers", str(wrong.dtype)):
            read(demo, data)
    case = tiny.pair("bart", "Bart", tiny.BART)
    with refusal("whole numbers"):
        read(case.build(), [{"input": tiny.tokens(2, 3), "decoder_input": wrong}])


def test_a_batch_alone_is_told_where_to_go(demo):
    with refusal("goes into a list"):
        read(demo, {"input": torch.tensor([[0, 5]])})


def test_whether_logits_predict_the_next_token(demo):
    bert = tiny.reader("bert", "BertForMaskedLM", "BertConfig", "softmax", settings=tiny.SIZE)
    oss = tiny.decoder("gpt_oss", "GptOss", "softmax", **zoo.LOCAL_MOE, **zoo.WIDE)
    pair = tiny.pair("t5", "T5", tiny.T5)
    both = {"input": tiny.tokens(), "decoder_input": tiny.tokens(length=7, seed=1)}
    for model, data, wanted in [
        (demo, TEXTS, True),
        (bert.build(), tiny.tokens(), False),
        (tiny.native(attention_dir="bidirectional"), tiny.tokens(), False),
        (tiny.native(), tiny.tokens(), True),
        (oss.build(), tiny.tokens(), True),
        (pair.build(), [both], True),
        (demo, torch.tensor([[0]]), False),
    ]:
        (batch,) = read(model, data)
        assert predicts_next(model, batch) == wanted


def test_tokens_that_are_never_given_do_not_count_as_seen():
    model = tiny.native()
    with torch.no_grad():
        model.unembed.b_U[7] = -torch.inf
    (batch,) = read(model, tiny.tokens())
    assert predicts_next(model, batch)


def test_a_dict_without_an_input(demo):
    with refusal("input, input_ids", "keys attention_mask, labels"):
        read(demo, [{"attention_mask": torch.ones(1, 3), "labels": 1}])


@pytest.mark.parametrize(
    ("data", "wrong"),
    [
        (torch.tensor([[0, 2048]]), "2048"),
        (torch.tensor([[-100, 5]]), "-100"),
        ([{"input_ids": [4_000]}], "4000"),
        ([{"input": torch.tensor([[9_999]])}], "9999"),
    ],
)
def test_tokens_of_another_vocabulary(demo, data, wrong):
    with refusal("between 0 and 2047", f"found {wrong}", "another model"):
        read(demo, data)


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_holds_at_least_one_sequence(demo, size):
    with refusal("batch_size", f"found {size}"):
        read(demo, TEXTS, batch_size=size)


@settings(max_examples=25)
@given(
    texts=st.lists(st.text("abc =\n", min_size=1, max_size=40), min_size=1, max_size=6),
    context=st.integers(2, 12),
    limit=st.none() | st.integers(1, 5),
)
def test_windows_are_the_stream_cut_up(demo, texts, context, limit):
    bos, width = demo.tokenizer.bos_token_id, context - 1
    stream = [i for t in texts for i in demo.tokenizer(t, add_special_tokens=False)["input_ids"]]
    expected = [
        [bos, *stream[start : start + width]] for start in range(0, len(stream) - width + 1, width)
    ][:limit]
    # A text shorter than one window is measured as it is.
    expected = expected or [[bos, *stream]]
    assert text_windows(demo, texts, context, limit).tolist() == expected


def test_tokens_beyond_the_context_are_named_once(demo, caplog):
    longer = torch.randint(5, 90, (4, demo.cfg.n_ctx + 1))
    assert [batch.size for batch in batches(demo, longer, batch_size=1)] == [1] * 4
    (record,) = caplog.records
    assert "257 tokens are longer than the model's context of 256" in record.getMessage()
    caplog.clear()
    list(batches(demo, longer[:, :-1]))
    assert not caplog.records


def test_windows_of_nothing(demo):
    with refusal("no token"):
        text_windows(demo, [], 8)


def test_windows_read_no_more_text_than_they_need(demo):
    def endless():
        while True:
            yield "import os\n" * 50

    assert text_windows(demo, endless(), 32, limit=20).shape == (20, 32)


@pytest.mark.parametrize(("context", "limit"), [(1, None), (0, 3), (8, 0)])
def test_windows_need_room(demo, context, limit):
    with refusal("room for a token", f"context of {context}"):
        text_windows(demo, TEXTS, context, limit)


def test_a_main_input_of_the_models_own_name():
    size = dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads"], 2)
    size |= dict.fromkeys(["d_model", "encoder_ffn_dim", "decoder_ffn_dim"], 8)
    size |= dict.fromkeys(["encoder_layers", "decoder_layers"], 1)
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    config = transformers.WhisperConfig(
        vocab_size=16, num_mel_bins=4, max_source_positions=10, **size, **ends
    )
    model = transformers.WhisperForConditionalGeneration(config).eval()
    features, tokens = torch.randn(1, 4, 20), torch.arange(4, 10)[None]
    (batch,) = read(model, [{"input_features": features, "decoder_input_ids": tokens}])
    assert torch.equal(batch.inputs, features)
    assert torch.equal(batch.output_tokens, tokens)
    assert batch.run(model).logits.shape == (1, 6, 16)
