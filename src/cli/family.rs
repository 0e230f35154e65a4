//! Which family a model says it is of, and which built-in recipes are made for it.
//!
//! Passes go by structure; the family is what `config.json` names, and it only keeps a
//! built-in recipe, whose budgets are those published for one family, from being given
//! to another by mistake. A recipe file is given to anything.

use std::path::Path;

use anyhow::bail;

/// `model_type` of `config.json`, the family's name, and the prefix of its recipes.
const FAMILIES: &[(&str, &str, &str)] = &[
    ("llava", "LLaVA-1.5", "llava-1.5-"),
    ("llava_next", "LLaVA-NeXT", "llava-next-"),
    ("llava_onevision", "LLaVA-OneVision", "llava-next-"),
    ("video_llava", "Video-LLaVA", "video-llava-"),
    ("qwen2_vl", "Qwen2-VL", "qwen2.5-vl-"),
    ("qwen2_5_vl", "Qwen2.5-VL", "qwen2.5-vl-"),
];

/// The `model_type` that the configuration of a model at `root` states.
fn model_type(root: &Path) -> Option<String> {
    let text = std::fs::read_to_string(root.join("config.json")).ok()?;
    let config: serde_json::Value = serde_json::from_str(&text).ok()?;
    Some(config.get("model_type")?.as_str()?.to_owned())
}

/// The family's name for people: as it is known, or as the configuration has it.
pub(super) fn name(root: &Path) -> Option<String> {
    let stated = model_type(root)?;
    let known = FAMILIES.iter().find(|(key, _, _)| *key == stated);
    Some(known.map_or(stated, |(_, name, _)| (*name).to_owned()))
}

/// Refuses a built-in recipe that is made for another family than the model's, and
/// names those that are made for it.
pub(super) fn check(root: &Path, recipe: &str, built_in: &[&str]) -> anyhow::Result<()> {
    if !built_in.contains(&recipe) {
        return Ok(());
    }
    let of_recipe = FAMILIES
        .iter()
        .find(|(_, _, prefix)| recipe.starts_with(prefix));
    let stated = model_type(root);
    let of_model = FAMILIES
        .iter()
        .find(|(key, _, _)| stated.as_deref() == Some(*key));
    let (Some((_, meant, prefix)), Some((_, found, own))) = (of_recipe, of_model) else {
        return Ok(());
    };
    if prefix == own {
        return Ok(());
    }
    let fitting: Vec<&str> = built_in
        .iter()
        .copied()
        .filter(|r| r.starts_with(own))
        .collect();
    bail!(
        "the recipe '{recipe}' is made for {meant}, and config.json says that this model is {found}; use {}, or make \
         one with 'duet plan'",
        fitting.join(" or ")
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

    const BUILT_IN: [&str; 4] = [
        "demo",
        "llava-1.5-192",
        "video-llava-136",
        "video-llava-960",
    ];

    #[test]
    fn a_recipe_of_another_family_is_refused_with_the_right_ones() {
        let video = model(r#"{"model_type": "video_llava"}"#);
        assert_eq!(name(video.path()).unwrap(), "Video-LLaVA");
        let check =
            |recipe: &str| check(video.path(), recipe, &BUILT_IN).map_err(|e| e.to_string());
        let error = check("llava-1.5-192").unwrap_err();
        assert!(
            error.contains("video-llava-136 or video-llava-960") && error.contains("LLaVA-1.5"),
            "{error}"
        );
        check("video-llava-960").unwrap();
        // Made for no family, or somebody's own.
        check("demo").unwrap();
        check("llava-1.5-192.yaml").unwrap();
    }

    #[test]
    fn what_is_not_known_is_not_refused() {
        for text in [
            r#"{"model_type": "new_vlm"}"#,
            r#"{"model_type": 3}"#,
            "{}",
            "no JSON",
        ] {
            let other = model(text);
            check(other.path(), "llava-1.5-192", &BUILT_IN).unwrap();
        }
        assert!(check(Path::new("nowhere"), "llava-1.5-192", &BUILT_IN).is_ok());
        let new = model(r#"{"model_type": "new_vlm"}"#);
        assert_eq!(name(new.path()).unwrap(), "new_vlm");
    }
}
