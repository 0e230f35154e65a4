//! Which family a model is of, and which built-in recipes are made for it.
//!
//! Passes go by structure; the family is what `config.json` names, or what the graphs
//! show where it names none that is known. It keeps a built-in recipe, whose budgets are
//! those of one family, from being given to another by mistake. A recipe file is given
//! to anything.

use std::path::Path;

use anyhow::bail;

use super::{counts, load};
use crate::arch::Vlm;
use crate::passes::Recipe;

/// A family of models.
#[derive(Debug)]
pub(super) struct Family {
    /// `model_type` of `config.json`.
    types: &'static [&'static str],
    /// For people.
    name: &'static str,
    /// Prefix of its recipes.
    prefix: &'static str,
    /// What its recipes are made for.
    made_for: Nominal,
}

/// The model that a family's budgets are stated for.
#[derive(Clone, Copy, Debug)]
struct Nominal {
    /// Images that are merged alone and enter together: crops, frames.
    images: i64,
    /// Patch tokens of one.
    tokens: i64,
    cls: bool,
    layers: usize,
}

const fn nominal(images: i64, tokens: i64, cls: bool, layers: usize) -> Nominal {
    Nominal {
        images,
        tokens,
        cls,
        layers,
    }
}

const FAMILIES: &[Family] = &[
    Family {
        types: &["llava"],
        name: "LLaVA-1.5",
        prefix: "llava-1.5-",
        made_for: nominal(1, 576, true, 32),
    },
    Family {
        types: &["llava_next"],
        name: "LLaVA-NeXT",
        prefix: "llava-next-",
        made_for: nominal(counts::CROPS, 576, true, 32),
    },
    Family {
        types: &["llava_onevision"],
        name: "LLaVA-OneVision",
        prefix: "llava-onevision-",
        made_for: nominal(counts::CROPS, 729, false, 28),
    },
    Family {
        types: &["video_llava"],
        name: "Video-LLaVA",
        prefix: "video-llava-",
        made_for: nominal(8, 256, true, 32),
    },
    // An image of a thousand tokens is what the table of DUET-VLM's public
    // implementation (qwen2_5_vl) reckons with; any number occurs.
    Family {
        types: &["qwen2_5_vl", "qwen2_vl"],
        name: "Qwen2.5-VL",
        prefix: "qwen2.5-vl-",
        made_for: nominal(1, 1000, false, 28),
    },
];

/// The family that a `model_type` is of.
fn of_type(stated: &str) -> Option<&'static Family> {
    FAMILIES.iter().find(|f| f.types.contains(&stated))
}

/// What is known of a model's family.
#[derive(Debug)]
pub(super) struct Found {
    /// The family, if it is one that recipes are made for.
    family: Option<&'static Family>,
    /// Its name for people: as it is known, or as the configuration has it.
    pub(super) name: String,
    /// What says so.
    pub(super) said_by: &'static str,
}

/// The JSON file `name` of a model.
fn config(root: &Path, name: &str) -> Option<serde_json::Value> {
    let text = std::fs::read_to_string(root.join(name)).ok()?;
    serde_json::from_str(&text).ok()
}

/// The `model_type` that the configuration of a model at `root` states.
fn model_type(root: &Path) -> Option<String> {
    Some(
        config(root, "config.json")?
            .get("model_type")?
            .as_str()?
            .to_owned(),
    )
}

/// The family of a model at `root`: the configuration's word, else what its graphs show
/// beyond doubt.
pub(super) fn find(root: &Path, vlm: &Vlm) -> Option<Found> {
    let stated = model_type(root);
    if let Some(family) = stated.as_deref().and_then(of_type) {
        let name = match stated.as_deref() {
            Some("qwen2_vl") => "Qwen2-VL",
            _ => family.name,
        };
        return Some(Found {
            family: Some(family),
            name: name.to_owned(),
            said_by: "config.json says",
        });
    }
    let shown = by_structure(root, vlm);
    let name = stated.or_else(|| Some(shown?.0.name.to_owned()))?;
    Some(Found {
        family: shown.map(|(family, _)| family),
        name,
        said_by: shown.map_or("config.json says", |(_, said_by)| said_by),
    })
}

/// The family whose structure a model without a word about it has: one that no other
/// family shares.
fn by_structure(root: &Path, vlm: &Vlm) -> Option<(&'static Family, &'static str)> {
    if vlm.decoders().any(|(_, d)| d.position_rows == Some(3)) {
        let shows = "its decoder's three rows of positions (M-RoPE) show";
        return Some((of_type("qwen2_5_vl")?, shows));
    }
    // Frames alone, CLS among their features: no pooling, as other video models have.
    let clips = |t: &crate::arch::VisionTower| t.video && t.gives_cls();
    if vlm.towers().any(|(_, t)| clips(t)) {
        return Some((of_type("video_llava")?, "its tower for clips shows"));
    }
    crops(root, vlm)?;
    let (_, tower) = vlm.towers().find(|(_, t)| !t.video)?;
    Some(match tower.cls {
        true => (of_type("llava_next")?, "its crops and CLS token show"),
        false => (
            of_type("llava_onevision")?,
            "its crops without a CLS token show",
        ),
    })
}

/// Crops that an image is counted with, if the model takes images cut into crops: a
/// configuration with grids of them, or pixels with an axis for them.
pub(super) fn crops(root: &Path, vlm: &Vlm) -> Option<i64> {
    let grids = ["config.json", "preprocessor_config.json"]
        .iter()
        .filter_map(|name| config(root, name))
        .any(|c| c.get("image_grid_pinpoints").is_some_and(|g| g.is_array()));
    let axis = vlm.towers().any(|(index, tower)| {
        let ty = vlm.parts[index].model.value(tower.pixels).ty.as_ref();
        !tower.video && ty.and_then(|t| t.shape()).is_some_and(|s| s.len() == 5)
    });
    (grids || axis).then_some(counts::CROPS)
}

/// Share of the visual tokens that a layer sees on average, in the model that the recipe
/// is made for.
fn share(text: &str, made_for: Nominal) -> Option<f64> {
    let recipe = Recipe::parse(text).ok()?;
    let Nominal {
        images,
        tokens,
        cls,
        layers,
    } = made_for;
    let entering = images * recipe.tokens_left_of(tokens, cls).unwrap_or(tokens);
    let seen = recipe.tokens_per_layer(entering, layers);
    Some(counts::average(&seen) / (images * tokens) as f64)
}

/// Refuses a built-in recipe that is made for another family than that of the model at `root`,
/// and names those that are made for it, the one that leaves about as much first. A file of the
/// recipe's name comes before it.
pub(super) fn check(root: &Path, vlm: &Vlm, recipe: &str) -> anyhow::Result<()> {
    let built_in = load::RECIPES;
    let named = built_in.iter().find(|(name, _)| *name == recipe);
    let Some((_, text)) = named.filter(|_| !Path::new(recipe).is_file()) else {
        return Ok(());
    };
    let found = find(root, vlm);
    let found = found.as_ref();
    let made_for = FAMILIES.iter().find(|f| recipe.starts_with(f.prefix));
    let Some((meant, found, own)) =
        made_for.and_then(|meant| Some((meant, found?, found?.family?)))
    else {
        return Ok(());
    };
    if meant.prefix == own.prefix {
        return Ok(());
    }
    let asked = share(text, meant.made_for).unwrap_or(1.0);
    let mut fitting: Vec<(f64, &str)> = built_in
        .iter()
        .filter(|(name, _)| name.starts_with(own.prefix))
        .map(|(name, text)| (share(text, own.made_for).unwrap_or(1.0), *name))
        .collect();
    fitting.sort_by(|a, b| (a.0 - asked).abs().total_cmp(&(b.0 - asked).abs()));
    let percent = |share: f64| format!("{:.1} %", 100.0 * share);
    let list: Vec<String> = fitting
        .iter()
        .map(|(share, name)| format!("{name} ({})", percent(*share)))
        .collect();
    let (nearest, others) = match list.as_slice() {
        [] => ("a recipe of your own", String::new()),
        [only] => (only.as_str(), String::new()),
        [nearest, others @ ..] => (nearest.as_str(), format!(" (or {})", others.join(", "))),
    };
    bail!(
        "the recipe '{recipe}' is made for {}, and {} that this model is of {}'s kind. '{recipe}' lets a layer see {} of the \
         visual tokens on average; nearest to that is {nearest}{others}. 'duet plan' makes one for any budget, and a \
         recipe file is given to anything",
        meant.name,
        found.said_by,
        own.name,
        percent(asked)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(text: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), text).unwrap();
        dir
    }

    fn refusal(config: &str, recipe: &str) -> Option<String> {
        let dir = model(config);
        let refused = check(dir.path(), &Vlm::default(), recipe).err();
        refused.map(|e| e.to_string())
    }

    #[test]
    fn a_recipe_of_another_family_is_refused_with_the_nearest_first() {
        let video = r#"{"model_type": "video_llava"}"#;
        assert_eq!(
            find(model(video).path(), &Vlm::default()).unwrap().name,
            "Video-LLaVA"
        );
        // A third of the tokens: 960 of 2048 is nearer than 136.
        let error = refusal(video, "llava-1.5-192").unwrap();
        assert!(
            error.contains("33.3 %")
                && error.contains("nearest to that is video-llava-960 (46.9 %)"),
            "{error}"
        );
        let error = refusal(video, "llava-1.5-64").unwrap();
        assert!(
            error.contains("nearest to that is video-llava-136 (6.6 %)"),
            "{error}"
        );
        assert_eq!(refusal(video, "video-llava-960"), None);
        // Made for no family, or somebody's own.
        assert_eq!(refusal(video, "demo"), None);
        assert_eq!(refusal(video, "llava-1.5-192.yaml"), None);
        // Each of the two families of crops has its own.
        let one = refusal(r#"{"model_type": "llava_onevision"}"#, "llava-next-640").unwrap();
        assert!(
            one.contains("nearest to that is llava-onevision-810"),
            "{one}"
        );
        let qwen = r#"{"model_type": "qwen2_vl"}"#;
        assert_eq!(refusal(qwen, "qwen2.5-vl-640"), None);
        let error = refusal(qwen, "llava-next-prune").unwrap();
        assert!(
            error.contains("this model is of Qwen2.5-VL's kind"),
            "{error}"
        );
    }

    #[test]
    fn what_is_not_known_is_not_refused() {
        for text in [
            r#"{"model_type": "new_vlm"}"#,
            r#"{"model_type": 3}"#,
            "{}",
            "no JSON",
        ] {
            assert_eq!(refusal(text, "llava-1.5-192"), None, "{text}");
        }
        assert!(find(Path::new("nowhere"), &Vlm::default()).is_none());
        let new = model(r#"{"model_type": "new_vlm"}"#);
        assert_eq!(find(new.path(), &Vlm::default()).unwrap().name, "new_vlm");
    }
}
