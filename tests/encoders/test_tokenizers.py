"""The CLIP vocabulary against open_clip, the T5 pieces against sentencepiece."""

import json

import pytest

from mmdit.encoders.tokenizers import (
    CLIP_END,
    CLIP_START,
    T5_END,
    TINY,
    ClipTokenizer,
    T5Tokenizer,
    clean,
    pad,
    train_t5_pieces,
)

HARD = [
    "",
    "a photo of a cat",
    "word " * 200,
    "猫と犬が公園で遊ぶ",
    "👩🏽‍🚒 firefighter",
    "!",
    "World! Hello!!",
    "don't stop, it's what we'll do",
    "Tom &amp; Jerry &lt;3",
    "  many   spaces\n\ttabs ",
    "naïve café résumé, ÀÉÎ ŒUVRE",
    "3.14159 x 100% = №5",
    "“quotes” – dash… ﬁ ½",
    "mojibake: schÃ¶n",
    "x" * 300,
    "🇩🇪 flag, हिन्दी, ẞ straße",
    "<|endoftext|> a cat",
]


@pytest.fixture(scope="module")
def clip():
    return ClipTokenizer()


@pytest.mark.parametrize("text", HARD, ids=lambda text: text[:16] or "empty")
def test_clip_ids_equal_those_of_open_clip(clip, text):
    open_clip = pytest.importorskip("open_clip.tokenizer")
    theirs = open_clip.SimpleTokenizer()([text])[0].tolist()
    ours = clip([text])[0]
    assert theirs == ours + [0] * (77 - len(ours))


def test_clip_ids_of_known_texts_are_golden(clip):
    assert clip(["a photo of a cat", "", "!"]) == [
        [CLIP_START, 320, 1125, 539, 320, 2368, CLIP_END],
        [CLIP_START, CLIP_END],
        [CLIP_START, 256, CLIP_END],
    ]


def test_an_exclamation_mark_never_becomes_padding(clip):
    assert 0 not in clip(["World! Hello!!"])[0]


def test_long_captions_keep_76_ids_and_the_end_token(clip):
    (ids,) = clip(["word " * 200])
    assert len(ids) == 77
    assert ids[0] == CLIP_START
    assert ids[-1] == CLIP_END
    assert ids.count(CLIP_END) == 1


def test_special_tokens_written_in_a_caption_do_not_end_it(clip):
    (ids,) = clip(["<|endoftext|> a cat"])
    assert ids.index(CLIP_END) == len(ids) - 1
    assert ids[-2] == 2368


def test_clean_undoes_entities_and_white_space():
    assert clean("  Tom &amp;amp; Jerry\n\t") == "Tom & Jerry"


def test_a_tokenizer_folder_gives_the_same_ids(clip, tmp_path):
    clip._tokenizer.save_pretrained(str(tmp_path))
    assert ClipTokenizer(tmp_path)(HARD[:8]) == clip(HARD[:8])


def test_a_folder_with_a_broken_vocabulary_is_refused(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({"<|startoftext|>": 0, "<|endoftext|>": 1}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    with pytest.raises(ValueError, match="49408"):
        ClipTokenizer(tmp_path)


def test_a_missing_folder_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="packaged CLIP vocabulary"):
        ClipTokenizer(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="train_tiny_encoders"):
        T5Tokenizer(tmp_path / "nowhere")


def test_t5_ids_are_sentencepiece_and_the_end_token():
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_file=str(TINY / "spiece.model"))
    captions = ["a small red circle left of a blue square", "", "woman firefighter: medium-dark skin tone", "猫"]
    assert T5Tokenizer(TINY)(captions, 77) == [[*pieces.encode(caption), T5_END] for caption in captions]


def test_t5_ids_equal_those_of_transformers():
    from transformers import T5Tokenizer as Reference

    reference = Reference.from_pretrained(str(TINY), extra_ids=0)
    captions = ["a small red circle left of a blue square", "", "three cyan triangles and two large stars"]
    assert T5Tokenizer(TINY)(captions, 77) == reference(captions)["input_ids"]


def test_t5_keeps_the_end_token_of_long_captions():
    (ids,) = T5Tokenizer(TINY)(["a red circle and " * 60], 20)
    assert len(ids) == 20
    assert ids[-1] == T5_END


def test_the_shipped_pieces_are_few_and_know_our_words():
    tokenizer = T5Tokenizer(TINY)
    assert len(tokenizer) <= 1_000
    (ids,) = tokenizer(["a small red circle left of a large blue square"], 77)
    assert len(ids) == 11  # one piece a word, and the end
    assert 2 not in ids  # nothing unknown


def test_training_pieces_twice_gives_the_same_file(tmp_path):
    sentences = [f"a {colour} {shape}" for colour in ("red", "green", "blue") for shape in ("circle", "square")] * 5
    train_t5_pieces(sentences, tmp_path / "a.model", 60, ["red", "square"])
    train_t5_pieces(sentences, tmp_path / "b.model", 60, ["red", "square"])
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    tokenizer = T5Tokenizer(tmp_path / "a.model")
    (ids,) = tokenizer(["red square"], 77)
    assert [tokenizer.id_to_piece(i) for i in ids] == ["\u2581red", "\u2581square", "</s>"]


def test_a_model_with_other_special_ids_is_refused(tmp_path):
    import io

    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(sentence_iterator=iter(["a red circle", "a blue square"] * 9), model_writer=model,
                               vocab_size=30, hard_vocab_limit=False, minloglevel=2)  # fmt: skip
    (tmp_path / "spiece.model").write_bytes(model.getvalue())
    with pytest.raises(ValueError, match="pad, end, unknown"):
        T5Tokenizer(tmp_path)


def test_pad_fills_up_on_the_right():
    assert pad([[5, 6], [7]], 9, 3).tolist() == [[5, 6, 9], [7, 9, 9]]
