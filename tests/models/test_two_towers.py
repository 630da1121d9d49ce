"""Two towers: normalised, blind to padding, saved and loaded with their pixels; CLIP of transformers in the same form."""

import pytest
import torch

from stillhouse.data import load_data
from stillhouse.data.characters import caption_ids
from stillhouse.errors import UserError
from stillhouse.facts import Facts
from stillhouse.losses.contrastive import image_text
from stillhouse.models import ModelSpec, load, load_clip, save
from stillhouse.models.two_towers import ByteTower, HubTowers

SPEC = {"kind": "two-towers", "image": "cnn:4-6", "width": 5, "text_hidden": 6}
FACTS = Facts({"pixel_values": (1, 8, 8), "input_ids": (40,)}, num_classes=3)


def test_embeddings_are_normalised_and_texts_are_read_as_their_ids():
    towers = ModelSpec.parse(SPEC).build(FACTS).eval()
    images, texts = towers(torch.randn(4, 1, 8, 8), caption_ids(["a", "b", "a 3", "ü"]))
    for side in (images, texts):
        torch.testing.assert_close(side.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(towers.encode_texts(["a", "b", "a 3", "ü"]), texts)
    assert towers.scale.item() == pytest.approx(1 / 0.07)
    towers.logit_scale.data.fill_(9.0)
    assert towers.scale.item() == 100


def test_padding_has_no_part_in_a_text():
    tower = ByteTower(5, hidden=8, length=40)
    short, long = (torch.zeros(1, length, dtype=torch.long) for length in (4, 30))
    short[0, :3] = long[0, :3] = torch.tensor([7, 8, 9])
    torch.testing.assert_close(tower(short), tower(long))
    assert torch.isfinite(tower(torch.zeros(1, 4, dtype=torch.long))).all()


def test_towers_are_saved_with_their_pixels(tmp_path):
    towers = ModelSpec.parse(SPEC).build(FACTS).eval()
    towers.mean.fill_(0.3)
    save(towers, tmp_path / "towers")
    again = load(tmp_path / "towers").eval()
    assert again.mean.item() == pytest.approx(0.3)
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(again.encode_images(x), towers.encode_images(x))


def test_what_the_towers_do_not_read_is_refused():
    with pytest.raises(UserError, match="square images"):
        ModelSpec.parse(SPEC).build(Facts({"features": (3,)}))


def test_the_loss_of_pairs_is_two_cross_entropies_and_equal_texts_are_each_right():
    generator = torch.Generator().manual_seed(0)
    images, texts = (torch.nn.functional.normalize(torch.randn(6, 4, generator=generator)) for _ in range(2))
    logits = 10 * images @ texts.T
    both = sum(torch.nn.functional.cross_entropy(side, torch.arange(6)) for side in (logits, logits.T)) / 2
    torch.testing.assert_close(image_text(images, texts, 10.0), both)
    same = torch.arange(6)[:, None] % 3 == torch.arange(6) % 3
    twice = torch.cat([texts[:3], texts[:3]])
    found = image_text(images, twice, 10.0, same=same)
    rows = (10 * images @ twice.T).log_softmax(1), (10 * twice @ images.T).log_softmax(1)
    wanted = -sum((side * same / 2).sum(1).mean() for side in rows) / 2
    torch.testing.assert_close(found, wanted)
    with pytest.raises(UserError, match="at least 2 pairs"):
        image_text(images[:1], texts[:1], 1.0)


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """A CLIP model, tokenizer and image processor of transformers, as they are stored."""
    library = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    home = tmp_path_factory.mktemp("clip")
    words = {word: number for number, word in enumerate(["<pad>", "<unk>", "<eos>", "a", "cat", "dog"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = library.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>", model_max_length=8
    )
    fast.save_pretrained(home)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = library.CLIPConfig(
        text_config={**sizes, "vocab_size": 6, "max_position_embeddings": 8, "eos_token_id": 2},
        vision_config={**sizes, "image_size": 8, "patch_size": 4},
        projection_dim=6,
    )
    library.CLIPModel(config).save_pretrained(home)
    library.CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}).save_pretrained(home)
    return home


def test_a_clip_of_transformers_has_the_same_form(tiny_clip):
    towers = load_clip(str(tiny_clip)).eval()
    assert isinstance(towers, HubTowers)
    assert towers.size == 8
    assert towers.mean.shape == (3,)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        images, texts = towers.encode_images(x), towers.encode_texts(["a cat", "a dog"])
        ids = towers._tokenizer(["a cat", "a dog"], return_tensors="pt", padding=True)
        out = towers.image.model(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"], pixel_values=x)
        torch.testing.assert_close(towers.scale * images @ texts.T, out.logits_per_image)


def test_what_is_no_clip_says_so(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(UserError, match="could not be loaded"):
        load_clip(str(tmp_path))


def test_the_small_set_has_pairs():
    data = load_data({"kind": "characters", "characters": "01", "per_class": 10, "size": 8})
    towers = ModelSpec.parse(SPEC).build(data.facts)
    batch = data.split("train").batch(range(4))
    assert [side.shape for side in towers(batch["pixel_values"], batch["input_ids"])] == [(4, 5), (4, 5)]
