import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from duet_ray.config import SelectionConfig, TrainingConfig
from duet_ray.errors import SelectionError
from duet_ray.selection.base import SelectionContext
from duet_ray.selection.embeddings import centred, embed, sentence_model, unit
from tests.selection.toy_domain import ToyDomain, toy_domain
from tests.tiny_model import VOCAB_SIZE, tiny_llama, tiny_tokenizer


def context(*, batch_size: int = 4, model=None, embedding_model: str | None = None) -> SelectionContext:
    model = model if model is not None else tiny_llama()
    return SelectionContext(
        settings=SelectionConfig(method="logdet", batch_size=batch_size),
        training=TrainingConfig(),
        seed=0,
        load_base=lambda: (model, tiny_tokenizer()),
        embedding_model=embedding_model,
    )


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> tuple[str, BertModel]:
    """A sentence-embedding model of two small layers, as a folder and in memory."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            initializer_range=0.3,
        )
        model = BertModel(config, add_pooling_layer=False).eval()
    folder = tmp_path_factory.mktemp("encoder")
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 6
    tokenizer.save_pretrained(folder)
    return str(folder), model


def at_length_one(vector: torch.Tensor) -> np.ndarray:
    return (vector / vector.norm()).numpy()


@pytest.mark.parametrize("batch_size", [1, 5])
def test_without_a_model_of_its_own_a_row_is_the_mean_direction_of_its_tokens_two_thirds_up(batch_size):
    domain, rows, model = toy_domain(12), np.array([2, 3, 5, 7, 11]), tiny_llama(n_layers=3)
    found = embed(domain, rows, context(batch_size=batch_size, model=model))
    for row, vector in zip(rows, found, strict=True):
        ids = torch.tensor(domain.train.row(row).input_ids.astype("int64"))[None]  # alone, so without padding
        with torch.no_grad():
            states = model(ids, output_hidden_states=True).hidden_states[2][0]
        directions = torch.stack([state / state.norm() for state in states])
        np.testing.assert_allclose(vector, at_length_one(directions.mean(dim=0)), atol=1e-6)
    assert found.dtype == np.float32


def test_a_bfloat16_model_gives_nearly_the_same_vectors():
    domain, rows = toy_domain(6), np.arange(6)
    full = embed(domain, rows, context())
    half = embed(domain, rows, context(model=tiny_llama(dtype=torch.bfloat16)))
    assert half.dtype == np.float32
    assert ((full * half).sum(axis=1) > 0.999).all()
    np.testing.assert_allclose(np.linalg.norm(half, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_sentence_model_gives_the_mean_of_its_last_layer(encoder, batch_size):
    folder, model = encoder
    domain, rows = toy_domain(12), np.array([0, 4, 5, 6, 9])
    found = embed(domain, rows, context(batch_size=batch_size, embedding_model=folder))
    for row, vector in zip(rows, found, strict=True):
        ids = tiny_tokenizer()(domain.train.texts([row])[0]["text"]).input_ids[:6]  # the folder's tokenizer cuts there
        with torch.no_grad():
            states = model(torch.tensor([ids])).last_hidden_state[0]
        np.testing.assert_allclose(vector, at_length_one(states.mean(dim=0)), atol=1e-6)


def test_a_sentence_model_is_loaded_once_and_leaves_the_global_generator_alone(encoder):
    sentence_model.cache_clear()
    before = torch.random.get_rng_state()
    first = sentence_model(encoder[0])
    assert torch.equal(before, torch.random.get_rng_state())
    assert sentence_model(encoder[0]) is first


def test_a_model_that_is_not_there_is_an_error_with_the_path_in_the_study_file(tmp_path):
    with pytest.raises(SelectionError, match=r"selection\.embedding_model: .*nothing cannot be loaded: .*; give"):
        embed(toy_domain(4), np.arange(4), context(embedding_model=str(tmp_path / "nothing")))


def test_a_model_without_some_of_its_weights_is_refused(encoder, tmp_path):
    shallow = BertModel(encoder[1].config, add_pooling_layer=False)
    shallow.encoder.layer = shallow.encoder.layer[:1]  # the config still says 2
    shallow.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(SelectionError, match=r"selection\.embedding_model: .* lacks 16 of its weights"):
        sentence_model(str(tmp_path))


def test_embeddings_that_are_not_finite_are_refused():
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(torch.nan)
    with pytest.raises(SelectionError, match="4 of 4 embeddings are not finite"):
        embed(toy_domain(4), np.arange(4), context(model=model))


def test_centring_takes_off_the_mean_and_restores_the_length():
    vectors = unit(np.random.default_rng(0).normal(size=(50, 4)) + 5)
    expected = vectors - vectors.mean(axis=0)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(centred(vectors), expected, atol=1e-5)
    assert (vectors @ vectors.T).mean() > 0.9 > 0.1 > abs((centred(vectors) @ centred(vectors).T).mean())


def test_a_row_at_the_mean_has_no_direction():
    rows = unit(np.array([[1.0, 0.1], [1.0, -0.1], [1.0, 0.0], [1.0, 0.1], [1.0, -0.1]]))
    rows[2] = rows[[0, 1, 3, 4]].mean(axis=0)
    assert centred(rows)[2].tolist() == [0, 0]
    noise = np.random.default_rng(0).normal(scale=1e-7, size=(100, 7))
    assert not centred(unit(1 + noise)).any()


def test_progress_is_told_after_every_batch():
    told: list[tuple[str, int, int]] = []
    asked = SelectionContext(
        settings=SelectionConfig(method="logdet", batch_size=4),
        training=TrainingConfig(),
        seed=0,
        load_base=lambda: (tiny_llama(), tiny_tokenizer()),
        on_progress=lambda *event: told.append(event),
    )
    domain: ToyDomain = toy_domain(6)
    embed(domain, np.arange(6), asked)
    assert told == [("embed", 4, 6), ("embed", 6, 6)]
