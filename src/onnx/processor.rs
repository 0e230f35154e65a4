//! Processor configs: how many placeholders a client puts into the prompt for an
//! image.

use serde_json::Value;

/// The config with the new token count, or `None` if it says nothing about it.
///
/// LLaVA's processors (Transformers in Python, transformers.js) compute
/// ⌊h / patch⌋ · ⌊w / patch⌋ + `num_additional_image_tokens`, less one with the
/// strategy `default`; Video-LLaVA's counts all of them for each frame of a clip. `patches` is the grid, `features` what the encoder gives
/// now.
///
/// # Errors
/// Text that is no JSON object.
pub fn patch_processor(
    name: &str,
    text: &str,
    patches: i64,
    features: i64,
) -> Result<Option<String>, String> {
    let mut config: Value = serde_json::from_str(text).map_err(|e| e.to_string())?;
    let Some(map) = config.as_object_mut() else {
        return Err("expected a JSON object".into());
    };
    let mut changed = false;
    if map.contains_key("image_seq_length") {
        map.insert("image_seq_length".into(), features.into());
        changed = true;
    }
    // Video-LLaVA: all frames of a clip, each with its CLS token.
    let clip = map.get("video_seq_length").and_then(Value::as_i64);
    if let Some(clip) = clip.filter(|n| patches >= 0 && n % (patches + 1) == 0) {
        let frames = clip / (patches + 1);
        map.insert("video_seq_length".into(), (frames * features).into());
        changed = true;
    }
    let class = map.get("processor_class").and_then(Value::as_str);
    if matches!(
        class,
        Some("LlavaNextProcessor" | "LlavaOnevisionProcessor")
    ) {
        // They count the grid of all crops, and no field of theirs says that there is none.
        return Ok(None);
    }
    let llava = class == Some("LlavaProcessor") || map.contains_key("num_additional_image_tokens");
    if name == "processor_config.json" && llava {
        map.insert(
            "num_additional_image_tokens".into(),
            (features - patches).into(),
        );
        map.insert("vision_feature_select_strategy".into(), "full".into());
        changed = true;
    }
    if !changed {
        return Ok(None);
    }
    let text = serde_json::to_string_pretty(&config).map_err(|e| e.to_string())?;
    Ok(Some(text + "\n"))
}

/// The config whose `image_newline` clients put between the features, `width` numbers, with the 1 that
/// marks it as visual behind them; `None` if it has no such list.
///
/// The exports of optimum-intel and OpenVINO GenAI keep this weight of LLaVA-NeXT's there.
///
/// # Errors
/// Text that is no JSON object, or a list of another length.
pub fn mark_newline(text: &str, width: i64) -> Result<Option<String>, String> {
    let mut config: Value = serde_json::from_str(text).map_err(|e| e.to_string())?;
    let Some(newline) = config
        .get_mut("image_newline")
        .and_then(Value::as_array_mut)
    else {
        return Ok(None);
    };
    if i64::try_from(newline.len()) != Ok(width) {
        return Err(format!(
            "image_newline has {} numbers, the model's embeddings have {width}",
            newline.len()
        ));
    }
    newline.push(1.0.into());
    let text = serde_json::to_string_pretty(&config).map_err(|e| e.to_string())?;
    Ok(Some(text + "\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llava_expands_to_the_new_count() {
        let before = r#"{"patch_size": 14, "num_additional_image_tokens": 1, "processor_class": "LlavaProcessor",
            "vision_feature_select_strategy": "default"}"#;
        let after = patch_processor("processor_config.json", before, 576, 205)
            .unwrap()
            .unwrap();
        let after: Value = serde_json::from_str(&after).unwrap();
        assert_eq!(after["num_additional_image_tokens"], 205 - 576);
        assert_eq!(after["vision_feature_select_strategy"], "full");
        assert_eq!(after["patch_size"], 14);
        assert_eq!(
            patch_processor("config.json", r#"{"a": 1}"#, 576, 205).unwrap(),
            None
        );
        assert!(patch_processor("config.json", "[", 576, 205).is_err());
        let next = r#"{"processor_class": "LlavaNextProcessor", "num_additional_image_tokens": 1}"#;
        let name = "processor_config.json";
        assert_eq!(patch_processor(name, next, 576, 205).unwrap(), None);
    }

    #[test]
    fn newlines_are_marked_as_visual() {
        let after = mark_newline(r#"{"image_newline": [0.5, -0.25], "a": 1}"#, 2);
        let after: Value = serde_json::from_str(&after.unwrap().unwrap()).unwrap();
        assert_eq!(after["image_newline"], serde_json::json!([0.5, -0.25, 1.0]));
        assert_eq!(after["a"], 1);
        assert_eq!(mark_newline("{}", 2).unwrap(), None);
        assert!(mark_newline(r#"{"image_newline": [1]}"#, 2).is_err());
        assert!(mark_newline("[", 2).is_err());
    }
}
