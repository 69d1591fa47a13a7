"""The CLIP vocabulary against open_clip, the T5 pieces against sentencepiece."""

import json

import pytest

from mmdit.encoders.tokenizers import (
    CLIP_END,
    CLIP_START,
    T5_END,
    TINY,
    ClipTokenizer,
    ReleasedT5Tokenizer,
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


@pytest.mark.parametrize("text", ["half \ud83d of an emoji", "\udcff"])
def test_half_a_surrogate_pair_is_refused_in_words_or_repaired(clip, text):
    """A byte of a command line that is not UTF-8 becomes one; the programs below know no such text."""
    for tokenizer in (ClipTokenizer(cleaned=False), T5Tokenizer(TINY), ReleasedT5Tokenizer(TINY)):
        with pytest.raises(ValueError, match=r"half of a surrogate pair \(U\+D"):
            tokenizer([text], *([] if isinstance(tokenizer, ClipTokenizer) else [77]))
    assert clip([text])[0][-1] == CLIP_END


# --- as the releases read prompts ---------------------------------------------------------------------------------

PROMPTS = [
    *HARD,
    "</s> a cat <pad> <extra_id_0> b",
    "cat</s>dog",
    "a\u00a0b\u3000c\u200bd\u2028e",
    "nul\x00x\x07y",
    "ｆｕｌｌ ｗｉｄｔｈ, e\u0301 combining, \ufeffbom",
    "شجرة \u200frtl",
    " \t\n",
]


@pytest.fixture(scope="module")
def packaged():
    """transformers' own CLIP tokenizer over the packaged vocabulary, built here and not by the library."""
    import gzip

    from transformers import CLIPTokenizer

    from mmdit.encoders.tokenizers import BPE_FILE

    lines = gzip.decompress(BPE_FILE.read_bytes()).decode().split("\n")[1 : 49_408 - 514 + 1]
    byte_names = dict(zip([*range(33, 127), *range(161, 173), *range(174, 256)], [""] * 188, strict=True))
    letters = [chr(b) for b in byte_names] + [chr(256 + i) for i in range(68)]
    pieces = [*letters, *(f"{c}</w>" for c in letters), *(line.replace(" ", "") for line in lines)]
    vocab = {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=[tuple(line.split()) for line in lines])


@pytest.mark.parametrize("text", PROMPTS, ids=lambda text: repr(text[:16]))
def test_released_clip_ids_are_those_of_transformers(packaged, text):
    theirs = packaged(text, truncation=True, max_length=77)["input_ids"]
    assert ClipTokenizer(cleaned=False)([text]) == [theirs]


def test_the_two_readings_of_a_text_differ_where_they_should(clip):
    released = ClipTokenizer(cleaned=False)
    for text in ("Tom &amp; Jerry", "mojibake: schÃ¶n", "<|endoftext|> a cat"):
        assert released([text]) != clip([text])
    assert released(["<|endoftext|> a cat"]) == [[CLIP_START, CLIP_END, 320, 2368, CLIP_END]]
    assert released(["a photo of a cat"]) == clip(["a photo of a cat"])


def test_a_folder_that_pads_with_an_exclamation_mark_does_not_swallow_it(clip, tmp_path):
    """As tokenizer_2 of the releases is written: "!" is its padding, and a special token."""
    from transformers import CLIPTokenizer

    backend = json.loads(clip._tokenizer.backend_tokenizer.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(backend["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in backend["merges"])]))
    special = {"content": "!", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    config = {"tokenizer_class": "CLIPTokenizer", "pad_token": "!", "model_max_length": 77}
    config["added_tokens_decoder"] = {"0": {**special, "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert CLIPTokenizer.from_pretrained(str(tmp_path))("!")["input_ids"] == [CLIP_START, 0, CLIP_END]  # the trap
    released = ClipTokenizer(tmp_path, cleaned=False)
    assert released(PROMPTS) == ClipTokenizer(cleaned=False)(PROMPTS)
    assert released(["!"]) == [[CLIP_START, 256, CLIP_END]]


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory):
    """A spiece.model with the normalisation of T5's (nmt_nfkc), over words of our own."""
    folder = tmp_path_factory.mktemp("tokenizer_3")
    sentences = [*(text for text in HARD if text and len(text) < 200), "a photo of a cat on the mat", "0123456789"] * 20
    train_t5_pieces(sentences, folder / "spiece.model", 300)
    return folder


@pytest.mark.parametrize("text", PROMPTS, ids=lambda text: repr(text[:16]))
def test_released_t5_ids_are_those_of_transformers(t5_folder, text):
    from transformers import T5Tokenizer as Reference

    theirs = Reference.from_pretrained(str(t5_folder))(text, truncation=True, max_length=77)["input_ids"]
    assert ReleasedT5Tokenizer(t5_folder)([text], 77) == [theirs]


def test_released_t5_ids_are_sentencepiece_where_no_special_token_is_written(t5_folder):
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_file=str(t5_folder / "spiece.model"))
    plain = [text for text in PROMPTS if "</s>" not in text]
    for text, ours in zip(plain, ReleasedT5Tokenizer(t5_folder)(plain, 10**6), strict=True):
        theirs = [*pieces.encode(text), T5_END]
        if ours != theirs:  # a small model made here has ties, which the two programs may break differently
            assert pieces.decode(ours) == pieces.decode(theirs)
            scores = [sum(pieces.get_score(i) for i in ids) for ids in (ours, theirs)]
            assert scores[0] == pytest.approx(scores[1], abs=1e-4)


def test_every_form_of_a_t5_tokenizer_gives_the_same_ids(t5_folder, tmp_path):
    from transformers import T5Tokenizer as Reference

    Reference.from_pretrained(str(t5_folder)).save_pretrained(str(tmp_path))
    assert not (tmp_path / "spiece.model").exists()  # what a newer release's tokenizer_3 looks like
    forms = [t5_folder, t5_folder / "spiece.model", tmp_path, tmp_path / "tokenizer.json"]
    tokenizers = [ReleasedT5Tokenizer(form) for form in forms]
    assert all(tokenizer(PROMPTS, 77) == tokenizers[0](PROMPTS, 77) for tokenizer in tokenizers)
    assert len({len(tokenizer) for tokenizer in tokenizers}) == 1
    assert tokenizers[0].fingerprint == tokenizers[1].fingerprint


def test_what_is_no_t5_tokenizer_is_refused_in_words(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"spiece\.model or tokenizer\.json"):
        ReleasedT5Tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="tokenizer_3"):
        ReleasedT5Tokenizer(tmp_path / "nowhere.model")
    (tmp_path / "spiece.model").write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match=r"spiece\.model"):
        ReleasedT5Tokenizer(tmp_path / "spiece.model")
    with pytest.raises(ValueError, match="does not hold T5's"):
        ReleasedT5Tokenizer(tmp_path)
