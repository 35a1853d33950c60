"""Train the demo's crosscoders on the demo's language model: a CLT and, alike, per-layer transcoders.

This is the stage ``crosscoders`` of ``build_demo.py``, a plain training loop that reads from top to bottom:
harvest, standardise, train, fold, save, evaluate. Shapes: activations are (tokens, layers, d_model) in memory and
(layers, tokens, d_model) in a batch, as `Crosscoder` takes them.
"""

import argparse
import copy
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
import transformers
from build_demo import MEMORISED, Document, model_folder, next_token, read_corpus, training_texts
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import AutoTokenizer, GPT2LMHeadModel, PreTrainedTokenizerFast

import clt_plugin as cp
from clt_plugin.core.activations import jumprelu, step
from clt_plugin.core.features import SparseGroup

EXCLUDE_FIRST = 1  # position 0 (BOS) is neither trained on nor replaced


@dataclass(frozen=True)
class Recipe:
    """How a crosscoder is trained; activations are standardised, so units are those of a mean square of 1."""

    n_latents: int = 1536  # of each layer
    steps: int = 3000
    batch: int = 512  # tokens
    learning_rate: float = 3e-3  # of Adam; warmed up over 50 steps, and falling to 0 over the last fifth
    target_l0: float = 20.0  # active latents a token and layer
    l0_weight: float = 0.1  # of the penalty for missing the target; rises to this over the first 70% of the steps
    frequent: float = 0.05  # a latent that fires on more than this share of tokens ...
    frequent_weight: float = 1.0  # ... is pushed to fire less, with this weight, which rises alike
    bandwidth: float = 0.5  # of the straight-through gradient of the thresholds
    encoder_norm: float = 1.0  # of each encoder vector, at the start
    decoder_norm: float = 0.6  # of each latent's decoder vectors as one, at the start
    threshold: float = 1.0  # at the start
    firing: float = 0.03  # the share of tokens on which each latent fires, at the start
    dead_after: int = 50_000  # a latent that fired on none of so many tokens is dead ...
    dead_weight: float = 3e-3  # ... and its pre-activations are pushed up, with this weight


# ------------------------------------------------------------------------------------------------------ stage


def build_crosscoders(options: argparse.Namespace) -> None:
    """Stage ``crosscoders``: train a CLT and per-layer transcoders, save both and write what they are like."""
    folder = model_folder(options)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    n_layers = model.config.n_layer
    train_documents, held_out = read_corpus(options.corpus)
    splits = {"train": train_documents[::8], "held_out": held_out}

    torch.manual_seed(options.seed)
    activations = harvest(model, windows(tokenizer, training_texts(train_documents)))
    report = {
        "tokens_harvested": len(activations.x),
        "evaluated_on": {name: [f"{d.folder}/{d.name}" for d in split] for name, split in splits.items()},
        "language_model_sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "seed": options.seed,
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    recipe = Recipe(steps=options.crosscoder_steps)
    for name, wiring, chosen in [
        ("clt", cp.Wiring.clt(n_layers), recipe),
        ("plt", cp.Wiring.plt(n_layers), recipe),
    ]:
        torch.manual_seed(options.seed)
        crosscoder, trained = train_crosscoder(wiring, activations, chosen, name)
        trained["float16"] = check_float16(crosscoder, activations)
        crosscoder.half().save(options.output / name, overwrite=True)
        saved = cp.load(options.output / name, dtype=torch.float32)  # measure what was saved
        report[name] = {
            "recipe": asdict(chosen),
            "bytes": sum(path.stat().st_size for path in (options.output / name).iterdir()),
            **trained,
            **firing(saved, activations),
            **{split: evaluate(model, tokenizer, saved, documents) for split, documents in splits.items()},
            "memorised": memorised(model, tokenizer, saved),
        }
        print_report(name, report[name])
    (options.output / "crosscoders.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", "utf-8")


# ---------------------------------------------------------------------------------------------------- harvest


@dataclass
class Activations:
    """What the MLPs read and write on every token, in half precision and in the order of harvest.

    Attributes:
        x: MLP inputs, (tokens, layers, d_model).
        y: MLP outputs, likewise.
    """

    x: Tensor
    y: Tensor


def windows(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Cut every text into windows that begin with BOS.

    They hold 32 to 1,023 further tokens, log-uniformly drawn, and end at the end of a line where one is near, as the
    windows that the language model was trained on begin at the start of one.
    """
    breaks_line = ["\n" in tokenizer.decode([i]) for i in range(len(tokenizer))]
    longest = tokenizer.model_max_length - 1
    cut = []
    for text in tqdm(texts, "encoding"):
        ids, begin = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], 0
        while begin < len(ids):
            length = int(32 * (longest / 32) ** torch.rand(()).item())
            end = drawn = min(begin + length, len(ids))
            while end > begin + 16 and not breaks_line[ids[end - 1]]:
                end -= 1
            end = end if end > begin + 16 else drawn
            cut.append([tokenizer.bos_token_id, *ids[begin:end]])
            begin = end
    return cut


@torch.no_grad()
def harvest(model: GPT2LMHeadModel, cut: list[list[int]]) -> Activations:
    """Run the model on windows and keep every MLP's input and output, position 0 left out."""
    n_tokens = sum(len(window) - EXCLUDE_FIRST for window in cut)
    shape = (n_tokens, model.config.n_layer, model.config.n_embd)
    kept = Activations(torch.empty(shape, dtype=torch.float16), torch.empty(shape, dtype=torch.float16))
    cut, at = sorted(cut, key=len), 0
    with watched(model) as seen, tqdm(total=n_tokens, desc="harvesting") as bar:
        while cut:
            rows = [cut.pop() for _ in range(min(len(cut), max(1, 8192 // len(cut[-1]))))]
            ids, mask = torch.zeros(2, len(rows), len(rows[0]), dtype=torch.long)
            for row, window in enumerate(rows):
                ids[row, : len(window)], mask[row, : len(window)] = torch.tensor(window), 1
            model.transformer(input_ids=ids, attention_mask=mask, use_cache=False)
            mask[:, :EXCLUDE_FIRST] = 0
            new = slice(at, at := at + int(mask.sum()))
            for layer, (x, y) in seen.items():
                kept.x[new, layer], kept.y[new, layer] = x[mask.bool()].half(), y[mask.bool()].half()
            bar.update(new.stop - new.start)
    return kept


def spread(activations: Activations, n: int) -> Tensor:
    """The numbers of about `n` tokens at even distances."""
    return torch.linspace(0, len(activations.x) - 1, n).long()


@contextmanager
def watched(model: GPT2LMHeadModel) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """Keep what each MLP last read and wrote: {layer: (x, y)}, each (batch, positions, d_model)."""
    seen = {}
    handles = [
        block.mlp.register_forward_hook(lambda _, args, y, layer=layer: seen.update({layer: (args[0], y)}))
        for layer, block in enumerate(model.transformer.h)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Standard:
    """Means and scales that give every site mean 0 and mean square 1.

    One scale a site, not one a coordinate: a coordinate that hardly varies would get a huge weight when folded.

    Attributes:
        x_mean: (layers, 1, d_model).
        x_scale: (layers, 1, 1).
        y_mean: As for x.
        y_scale: As for x.
    """

    x_mean: Tensor
    x_scale: Tensor
    y_mean: Tensor
    y_scale: Tensor

    @classmethod
    def of(cls, activations: Activations) -> "Standard":
        """Measure them on 100,000 tokens drawn from everywhere (the first ones would not be typical)."""
        drawn = torch.randperm(len(activations.x))[:100_000]
        found = []
        for site in (activations.x, activations.y):
            values = site[drawn].float().transpose(0, 1)
            mean = values.mean(1, keepdim=True)
            found += [mean, (values - mean).square().mean((1, 2), keepdim=True).sqrt()]
        return cls(*found)

    def batch(self, activations: Activations, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return some tokens' x and y, standardised, each (layers, tokens, d_model)."""
        x, y = (site[tokens].float().transpose(0, 1) for site in (activations.x, activations.y))
        return (x - self.x_mean) / self.x_scale, (y - self.y_mean) / self.y_scale


# ------------------------------------------------------------------------------------------------------ train


def train_crosscoder(
    wiring: cp.Wiring, activations: Activations, recipe: Recipe, name: str
) -> tuple[cp.Crosscoder, dict]:
    """Train a crosscoder; return it folded, so that it acts on raw activations, and how its training went."""
    standard = Standard.of(activations)
    crosscoder = new_crosscoder(wiring, standard, activations, recipe)
    optimizer = torch.optim.Adam(crosscoder.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.99), fused=True)
    silent = [torch.zeros(recipe.n_latents) for _ in range(wiring.n_groups)]  # tokens since each latent fired
    errors, started = [], time.perf_counter()
    for number, tokens in enumerate(bar := tqdm(shuffled(len(activations.x), recipe), name, recipe.steps)):
        progress = number / recipe.steps
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * min(1, (number + 1) / 50, (1 - progress) / 0.2)
        x, y = standard.batch(activations, tokens)

        features, penalty, n_active = [], 0.0, []
        for g, threshold in enumerate(crosscoder.threshold):
            h = crosscoder.pre_activations(g, x[g])  # (batch, latents)
            # All that is not active or within the bandwidth has no gradient: from here on, it can be left out.
            token, latent = (h > threshold - recipe.bandwidth / 2).nonzero(as_tuple=True)
            near, its_threshold = h[token, latent], threshold.index_select(0, latent)
            acts = jumprelu(near, its_threshold, recipe.bandwidth)
            features.append(SparseGroup(token, latent, acts, recipe.n_latents))

            fires = step(near, its_threshold, recipe.bandwidth)
            rates = torch.zeros(recipe.n_latents).index_add(0, latent, fires) / recipe.batch
            missed = (rates.sum() - recipe.target_l0) ** 2 * 2 / recipe.target_l0
            too_often = F.relu(rates - recipe.frequent).sum()
            rising = min(1, progress / 0.7)
            penalty += rising * (recipe.l0_weight * missed + recipe.frequent_weight * too_often)
            n_active.append(rates.sum().item())

            silent[g] += recipe.batch
            silent[g][latent[acts > 0]] = 0
            dead = (silent[g] > recipe.dead_after).nonzero().squeeze(1)
            if len(dead):
                short = F.relu(threshold[dead] - h[:, dead]) * crosscoder.W_dec[g][dead].norm(dim=1)
                penalty += recipe.dead_weight * short.sum() / recipe.batch

        error = (crosscoder.decode(cp.SparseFeatures(tuple(features), (recipe.batch,))) - y).square().sum(-1).mean(1)
        optimizer.zero_grad()
        (error.sum() + penalty).backward()
        optimizer.step()
        for threshold in crosscoder.threshold:
            threshold.data.clamp_(min=0)  # below 0 a latent could fire with a negative activation
        errors.append(error.detach() / y.shape[-1])  # about the fraction of variance unexplained
        if number % 20 == 0:
            bar.set_postfix(fvu=f"{errors[-1].mean():.3f}", l0=" ".join(f"{n:.0f}" for n in n_active))

    trained = {
        "seconds": round(time.perf_counter() - started, 1),
        "tokens_seen": recipe.steps * recipe.batch,
        "epochs": round(recipe.steps * recipe.batch / len(activations.x), 2),
        "fvu_of_the_last_batches": round(torch.stack(errors[-100:]).mean().item(), 4),
        "mean_threshold": [round(t.mean().item(), 3) for t in crosscoder.threshold],
        "fold_error": fold(crosscoder, standard, activations),
    }
    return crosscoder, trained


def shuffled(n_tokens: int, recipe: Recipe) -> Iterator[Tensor]:
    """Draw the tokens of every batch, (batch,): each token once before any comes again."""
    order, at = torch.randperm(n_tokens), 0
    for _ in range(recipe.steps):
        if at + recipe.batch > n_tokens:
            order, at = torch.randperm(n_tokens), 0
        yield order[at : at + recipe.batch]
        at += recipe.batch


@torch.no_grad()
def new_crosscoder(wiring: cp.Wiring, standard: Standard, activations: Activations, recipe: Recipe) -> cp.Crosscoder:
    """Make a crosscoder in which each latent begins as a token.

    Its encoder vector points where that token's MLP input lies and its decoder vectors where the outputs lie that it
    writes, and b_enc is such that it fires on the chosen share of tokens.
    """
    n_layers = wiring.n_layers
    host = cp.Host(model_name="clt_plugin/demo", n_layers=n_layers, exclude_first=EXCLUDE_FIRST)
    width = activations.x.shape[-1]
    crosscoder = cp.Crosscoder(wiring, width, recipe.n_latents, "jumprelu", bandwidth=recipe.bandwidth, host=host)
    x, y = standard.batch(activations, torch.randperm(len(activations.x))[: recipe.n_latents + 4000])
    for g, writes in enumerate(wiring.writes):
        outputs = torch.cat([y[site.layer, : recipe.n_latents] for site in writes], dim=1)
        crosscoder.W_enc[g].copy_(F.normalize(x[g, : recipe.n_latents]).T * recipe.encoder_norm)
        crosscoder.W_dec[g].copy_(F.normalize(outputs) * recipe.decoder_norm)
        crosscoder.threshold[g].fill_(recipe.threshold)
        h = crosscoder.pre_activations(g, x[g, recipe.n_latents :])
        crosscoder.b_enc[g].copy_(recipe.threshold - h.quantile(1 - recipe.firing, dim=0))
    return crosscoder


@torch.no_grad()
def fold(crosscoder: cp.Crosscoder, standard: Standard, activations: Activations) -> float:
    """Fold the standardisation into the weights, so that the crosscoder maps raw x to raw y.

    ``x' = (x - mean) / scale`` goes into the encoder; pre-activations, and with them thresholds, stay what they are.
    ``y = y' * scale + mean`` goes into the decoder.

    Returns:
        The largest difference that it makes to a reconstruction, relative to the largest value; in float64.
    """
    crosscoder.double()
    tokens = spread(activations, 1000)
    exact = {name: value.double() for name, value in vars(standard).items()}
    raw = activations.x[tokens].double().transpose(0, 1)
    expected = crosscoder((raw - exact["x_mean"]) / exact["x_scale"]) * exact["y_scale"] + exact["y_mean"]
    for g, writes in enumerate(crosscoder.wiring.writes):
        crosscoder.W_enc[g] /= exact["x_scale"][g]
        crosscoder.b_enc[g] -= (exact["x_mean"][g] @ crosscoder.W_enc[g]).squeeze(0)
        for site in writes:
            crosscoder.W_dec[g][:, crosscoder.layout.write_slices[g][site]] *= exact["y_scale"][site.layer]
    for site, bias in zip(crosscoder.wiring.write_sites, crosscoder.b_dec, strict=True):
        bias.copy_(bias * exact["y_scale"][site.layer, 0] + exact["y_mean"][site.layer, 0])
    error = ((crosscoder(raw) - expected).abs().max() / expected.abs().max()).item()
    assert error < 1e-9, f"folding changes the reconstruction by {error}"
    crosscoder.float()
    return error


def check_float16(crosscoder: cp.Crosscoder, activations: Activations) -> dict:
    """What rounding to half precision costs: the fraction of variance unexplained before and after."""
    tokens = spread(activations, 20_000)
    x, y = (site[tokens].float().transpose(0, 1) for site in (activations.x, activations.y))
    rounded = copy.deepcopy(crosscoder).half().float()
    with torch.no_grad():
        fvu = [fraction_unexplained(each(x), y).mean().item() for each in (crosscoder, rounded)]
    return {"fvu_in_float32": round(fvu[0], 6), "fvu_in_float16": round(fvu[1], 6)}


# --------------------------------------------------------------------------------------------------- evaluate


def fraction_unexplained(reconstruction: Tensor, y: Tensor) -> Tensor:
    """The fraction of variance unexplained of each layer, (layers,), from (layers, tokens, d_model) each."""
    residual = (reconstruction - y).double().square().sum((1, 2))
    return residual / (y - y.mean(1, keepdim=True)).double().square().sum((1, 2))


@torch.no_grad()
def firing(crosscoder: cp.Crosscoder, activations: Activations) -> dict:
    """How many latents of each layer fire on none, or on over a tenth, of all tokens harvested."""
    rates = torch.zeros(crosscoder.wiring.n_groups, crosscoder.n_latents)
    for tokens in tqdm(torch.arange(len(activations.x)).split(2048), "firing rates"):
        for g, threshold in enumerate(crosscoder.threshold):
            h = crosscoder.pre_activations(g, activations.x[tokens, g])
            rates[g] += (h > threshold).sum(0) / len(activations.x)
    return {
        "dead_latents_by_layer": rounded((rates == 0).float().mean(1)),
        "dense_latents_by_layer": rounded((rates > 0.1).float().mean(1)),
    }


@contextmanager
def replaced(model: GPT2LMHeadModel, crosscoder: cp.Crosscoder) -> Iterator[None]:
    """Put the crosscoder's reconstruction in place of every MLP's output, at all positions but the first."""
    written = {}

    def hook(layer: int) -> Callable:
        def replace_output(module: torch.nn.Module, args: tuple[Tensor], y: Tensor) -> Tensor:
            if layer == 0:
                written.clear()
            acts = crosscoder.encode_group(layer, args[0])
            acts[:, :EXCLUDE_FIRST] = 0
            for site, part in crosscoder.decode_group(layer, acts).items():
                written[site.layer] = written.get(site.layer, 0) + part
            reconstruction = written[layer] + crosscoder.b_dec[layer]
            return torch.cat([y[:, :EXCLUDE_FIRST], reconstruction[:, EXCLUDE_FIRST:]], dim=1)

        return replace_output

    handles = [b.mlp.register_forward_hook(hook(layer)) for layer, b in enumerate(model.transformer.h)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def evaluate(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, crosscoder: cp.Crosscoder, documents: list[Document]
) -> dict:
    """Measure a crosscoder on documents, read in pieces of up to 1,023 tokens that follow a BOS.

    Reconstruction and sparsity are those on the model's own activations; agreement, cross-entropy and KL compare the
    model with itself after all its MLPs are replaced. Position 0 counts nowhere.
    """
    bos, longest = tokenizer.bos_token_id, tokenizer.model_max_length - 1
    xs, ys, sums, n_tokens = [], [], torch.zeros(4, dtype=torch.float64), 0
    for document in tqdm(documents, "evaluating"):
        ids = [*tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"], bos]
        for begin in range(0, len(ids) - 1, longest):
            piece = torch.tensor([[bos, *ids[begin : begin + longest + 1]]])
            inputs, targets = piece[:, :-1], piece[0, EXCLUDE_FIRST + 1 :]
            mask = torch.ones_like(inputs)
            with watched(model) as seen:
                original = model(inputs, attention_mask=mask).logits[0, EXCLUDE_FIRST:].log_softmax(-1)
            with replaced(model, crosscoder):
                new = model(inputs, attention_mask=mask).logits[0, EXCLUDE_FIRST:].log_softmax(-1)
            x, y = (torch.stack(site)[:, 0, EXCLUDE_FIRST:] for site in zip(*seen.values(), strict=True))
            xs.append(x)
            ys.append(y)
            sums += torch.stack(
                [
                    (original.argmax(-1) == new.argmax(-1)).sum(),
                    F.nll_loss(original, targets, reduction="sum"),
                    F.nll_loss(new, targets, reduction="sum"),
                    F.kl_div(new, original, reduction="sum", log_target=True),
                ]
            )
            n_tokens += len(targets)
    x, y = torch.cat(xs, 1), torch.cat(ys, 1)
    n_active = torch.zeros(len(x), dtype=torch.float64)
    reconstruction = []
    for tokens in torch.arange(x.shape[1]).split(2048):
        acts = crosscoder.encode(x[:, tokens])
        n_active += (acts > 0).sum((1, 2))
        reconstruction.append(crosscoder.decode(acts))
    fvu, sums = fraction_unexplained(torch.cat(reconstruction, 1), y), sums / n_tokens
    return {
        "documents": len(documents),
        "tokens": n_tokens,
        "fvu": round(fvu.mean().item(), 4),
        "fvu_by_layer": rounded(fvu),
        "l0_by_layer": rounded(n_active / n_tokens, 2),
        "top1_agreement": round(sums[0].item(), 4),
        "cross_entropy": {"original": round(sums[1].item(), 4), "replaced": round(sums[2].item(), 4)},
        "kl": round(sums[3].item(), 4),
    }


def memorised(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, crosscoder: cp.Crosscoder) -> list[dict]:
    """How probable the model finds what follows each memorised prompt, as it is and with its MLPs replaced."""
    rows = []
    for prompt, text in MEMORISED:
        original = next_token(model, tokenizer, prompt, text)
        with replaced(model, crosscoder):
            new = next_token(model, tokenizer, prompt, text)
        rows.append(
            {
                "prompt": prompt,
                "next": new["next"],
                "probability": {"original": original["probability"], "replaced": new["probability"]},
                "top_when_replaced": new["top"],
            }
        )
    return rows


def rounded(values: Tensor, digits: int = 4) -> list[float]:
    """A tensor as a list of rounded numbers, for JSON."""
    return [round(value, digits) for value in values.tolist()]


def print_report(name: str, report: dict) -> None:
    """Print the figures that matter most."""
    print(f"{name}: trained for {report['seconds']} s, {report['bytes'] / 1e6:.2f} MB, {report['float16']}")
    print(f"  dead {report['dead_latents_by_layer']}, dense {report['dense_latents_by_layer']}")
    for split in ("train", "held_out"):
        print(f"  {split}: { {key: report[split][key] for key in report[split] if key != 'documents'} }")
    for row in report["memorised"]:
        print(f"  P({row['next']!r} | ... {row['prompt'][-40:]!r}) = {row['probability']}")
