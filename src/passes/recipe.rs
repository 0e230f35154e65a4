//! Recipes: which passes, in which order, with which parameters (YAML).

use serde::{Deserialize, Serialize};
use serde_yaml::Value;

use super::{
    Context, Marker, Pass, PassError, Placement, REGISTRY, Stage, TokenMerge, VisualPrune,
};
use crate::arch::{VisionTower, Vlm};
use crate::suggest::unknown;

/// A token budget: a count, or a ratio of the tokens there are.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Count {
    /// Tokens.
    Tokens(i64),
    /// ⌊ratio · N⌋, in double precision.
    Ratio(f64),
}

/// The largest count of tokens that a recipe may state.
pub(super) const MAX_COUNT: i64 = i32::MAX as i64;

impl<'de> Deserialize<'de> for Count {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use serde::de::Error;
        match Value::deserialize(deserializer)? {
            Value::Number(n) if n.is_f64() => match n.as_f64() {
                Some(r) if (0.0..=1.0).contains(&r) => Ok(Self::Ratio(r)),
                _ => Err(D::Error::custom(format!(
                    "{n} is no ratio; expected 0.0 to 1.0"
                ))),
            },
            // Graphs multiply counts, which has to stay within 64 bits.
            Value::Number(n) => match n.as_i64() {
                Some(count) if (0..=MAX_COUNT).contains(&count) => Ok(Self::Tokens(count)),
                _ => Err(D::Error::custom(format!(
                    "{n} is no token count; expected 0 to {MAX_COUNT}"
                ))),
            },
            _ => Err(D::Error::custom(
                "expected a token count (300) or a ratio (0.5)",
            )),
        }
    }
}

impl Count {
    /// Tokens out of `total`, not clamped.
    pub fn of(self, total: i64) -> i64 {
        match self {
            Self::Tokens(n) => n,
            #[allow(clippy::cast_possible_truncation, reason = "token counts fit")]
            Self::Ratio(r) => (r * total as f64) as i64,
        }
    }
}

/// What happens to the position ids of tokens that stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Positions {
    /// Contiguous again after every drop.
    #[default]
    Renumber,
    /// As they were.
    Keep,
}

/// How the caches behind a drop are laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KvLayout {
    /// Each layer's cache is as long as what the layer saw.
    #[default]
    Ragged,
    /// All layers report the full length.
    Padded,
}

/// Of which tokens the decoder gives logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Logits {
    /// Of all that are left.
    #[default]
    All,
    /// Of the last one, which is what generating text needs.
    Last,
}

/// Where the visual tokens lie, for `marker: static`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StaticSpan {
    /// Position of the first visual token in the sequence.
    pub start: i64,
    /// Number of visual tokens.
    pub count: i64,
}

/// A parsed recipe.
#[derive(Debug)]
pub struct Recipe {
    /// Passes in order.
    pub passes: Vec<Box<dyn Pass>>,
    /// Settings that concern several passes.
    pub context: Context,
    /// The YAML text it was read from, for the stamp.
    pub text: String,
}

/// Pruning in the decoder.
#[derive(Clone, Copy, Debug)]
pub struct Pruning<'a> {
    /// The pass: the scope of what it inserts.
    pub pass: &'static str,
    /// What it does.
    pub prune: &'a VisualPrune,
}

#[derive(Deserialize)]
struct Raw {
    version: u64,
    #[serde(default)]
    passes: Vec<Value>,
    #[serde(default)]
    marker: Option<Marker>,
    #[serde(default)]
    span: Option<StaticSpan>,
    #[serde(default)]
    kv: KvLayout,
    #[serde(default)]
    logits: Logits,
}

const KEYS: &[&str] = &["version", "passes", "marker", "span", "kv", "logits"];

impl Recipe {
    /// Reads a recipe.
    ///
    /// # Errors
    /// Anything that is no recipe; unknown keys name the nearest known one.
    pub fn parse(text: &str) -> Result<Self, PassError> {
        let bad = |e: String| PassError::Recipe(e);
        let value: Value = serde_yaml::from_str(text).map_err(|e| bad(e.to_string()))?;
        if !value.is_mapping() {
            return Err(bad(
                "expected a mapping with the keys 'version' and 'passes'".into(),
            ));
        }
        check_keys(&value, KEYS, "the recipe")?;
        let raw: Raw = serde_yaml::from_value(value).map_err(|e| bad(e.to_string()))?;
        if raw.version != 1 {
            return Err(bad(format!(
                "version {} is not known; expected 1",
                raw.version
            )));
        }
        let mut passes: Vec<Box<dyn Pass>> = Vec::new();
        for value in raw.passes {
            let pass = parse_pass(value)?;
            if passes.iter().any(|p| p.name() == pass.name()) {
                return Err(bad(format!("{} is listed twice", pass.name())));
            }
            passes.push(pass);
        }
        let stage = |pass: &dyn Pass| {
            let mut entries = REGISTRY.iter();
            entries.find(|e| e.name == pass.name()).map(|e| e.stage)
        };
        if !passes.is_sorted_by_key(|p| stage(p.as_ref())) {
            return Err(bad(
                "vision passes come before decoder passes; reorder 'passes'".into(),
            ));
        }
        for pair in passes.windows(2) {
            let (a, b) = (&pair[0], &pair[1]);
            if stage(a.as_ref()) == stage(b.as_ref()) {
                return Err(bad(format!(
                    "{} and {} both say which tokens {}; a recipe has one of them",
                    a.name(),
                    b.name(),
                    match stage(a.as_ref()) {
                        Some(Stage::Encoder) => "of the vision encoder stay",
                        _ => "stay in the decoder",
                    }
                )));
            }
        }
        if (raw.marker == Some(Marker::Static)) != raw.span.is_some() {
            return Err(bad(
                "'marker: static' and 'span: {start: S, count: C}' belong together".into(),
            ));
        }
        if raw.span.is_some_and(|s| s.start < 0 || s.count < 1) {
            return Err(bad("span: expected start >= 0 and count >= 1".into()));
        }
        let merge = of_type::<TokenMerge>(&passes);
        let context = Context {
            marker: raw.marker,
            span: raw.span,
            kv: raw.kv,
            logits: raw.logits,
            merges: merge.is_some(),
            fewer: passes
                .iter()
                .any(|p| stage(p.as_ref()) == Some(Stage::Encoder)),
            placement: merge.and_then(|m| m.placement),
            prunes: passes.iter().any(|p| p.pruning().is_some()),
            fixed: None,
        };
        Ok(Self {
            passes,
            context,
            text: text.to_owned(),
        })
    }

    /// The same recipe with `logits: last`.
    ///
    /// # Errors
    /// The recipe asks for all logits, or its text cannot be added to.
    pub fn with_last_logits(self) -> Result<Self, PassError> {
        if self.context.logits == Logits::Last {
            return Ok(self);
        }
        let text = format!("{}\nlogits: last\n", self.text.trim_end());
        Self::parse(&text).map_err(|_| {
            PassError::Recipe(
                "'logits: last' cannot be added to the recipe, which says 'logits: all' or is written in braces; \
                 write it there"
                    .into(),
            )
        })
    }

    /// Whether `vlm`'s vision encoder gives all features, and the decoder drops those that
    /// the recipe's merge discards.
    pub fn placed(&self, vlm: &Vlm) -> bool {
        self.context.placed(vlm)
    }

    /// Tokens that are left of an image in front of the decoder, of `candidates` that the encoder has
    /// (and CLS, if that may come with them); none where no pass works on the encoder's tokens.
    pub fn tokens_left_of(&self, candidates: i64, cls: bool) -> Option<i64> {
        let mut each = self.passes.iter();
        each.find_map(|p| p.left_of_image(candidates, cls))
    }

    /// The same for an image of `tower`; none also where only the run tells how many it has.
    pub fn tokens_left(&self, tower: &VisionTower, placement: Placement) -> Option<i64> {
        // Features that stay in their places have one for CLS only if it was among them.
        let cls = tower.cls && (placement == Placement::Encoder || tower.gives_cls());
        self.tokens_left_of(tower.candidates()?, cls)
    }

    /// Visual tokens that each of `layers` decoder layers sees of those that enter.
    pub fn tokens_per_layer(&self, entering: i64, layers: usize) -> Vec<i64> {
        let mut each = self.passes.iter();
        each.find_map(|p| p.seen_by_layers(entering, layers))
            .unwrap_or_else(|| vec![entering; layers])
    }

    /// How visual tokens are dropped in the decoder, and the pass that does.
    pub fn pruning(&self) -> Option<Pruning<'_>> {
        self.passes.iter().find_map(|p| {
            let prune = p.pruning()?;
            let pass = p.name();
            Some(Pruning { pass, prune })
        })
    }

    /// The pass that chooses among the vision encoder's tokens.
    pub fn encoder_pass(&self) -> Option<&dyn Pass> {
        let stage = |name: &str| REGISTRY.iter().find(|e| e.name == name).map(|e| e.stage);
        let mut each = self.passes.iter();
        each.find(|p| stage(p.name()) == Some(Stage::Encoder))
            .map(|p| p.as_ref())
    }

    /// The concrete pass of type `P`, if the recipe has one.
    pub fn pass<P: 'static>(&self) -> Option<&P> {
        of_type(&self.passes)
    }
}

fn of_type<P: 'static>(passes: &[Box<dyn Pass>]) -> Option<&P> {
    passes.iter().find_map(|p| p.as_any().downcast_ref())
}

fn parse_pass(value: Value) -> Result<Box<dyn Pass>, PassError> {
    let names: Vec<&str> = REGISTRY.iter().map(|e| e.name).collect();
    let (name, parameters) = match value {
        Value::String(name) => (name, Value::Mapping(serde_yaml::Mapping::new())),
        Value::Mapping(map) if map.len() == 1 => {
            let mut entries = map.into_iter();
            match entries.next() {
                Some((Value::String(name), parameters)) => (name, parameters),
                _ => return Err(PassError::Recipe("a pass is a name with parameters".into())),
            }
        }
        _ => {
            return Err(PassError::Recipe(format!(
                "each entry of 'passes' is one name with its parameters; known passes: {}",
                names.join(", ")
            )));
        }
    };
    let Some(entry) = REGISTRY.iter().find(|e| e.name == name) else {
        return Err(PassError::Recipe(unknown(
            "pass",
            &name,
            &names,
            "the recipe",
        )));
    };
    let parameters = match parameters {
        Value::Null => Value::Mapping(serde_yaml::Mapping::new()),
        other => other,
    };
    check_keys(&parameters, entry.keys, entry.name)?;
    (entry.parse)(parameters).map_err(|e| PassError::Recipe(format!("{name}: {e}")))
}

/// Refuses keys that are not known, naming the nearest that is.
pub(super) fn check_keys(value: &Value, known: &[&str], place: &str) -> Result<(), PassError> {
    let Value::Mapping(map) = value else {
        return Err(PassError::Recipe(format!("{place}: expected a mapping")));
    };
    for key in map.keys() {
        let name = key.as_str().unwrap_or_default();
        if !known.contains(&name) {
            let shown = key
                .as_str()
                .map_or_else(|| format!("{key:?}"), str::to_owned);
            return Err(PassError::Recipe(unknown("key", &shown, known, place)));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> String {
        Recipe::parse(text).unwrap_err().to_string()
    }

    #[test]
    fn unknown_keys_name_the_nearest() {
        assert!(error("version: 1\npases: []").contains("did you mean 'passes'?"));
        let merge = "version: 1\npasses:\n  - token_merge: {dominat: 3, contextual: 1}";
        assert!(error(merge).contains("did you mean 'dominant'?"));
        let pass = "version: 1\npasses:\n  - visual_prun: {}";
        assert!(error(pass).contains("did you mean 'visual_prune'?"));
        let drop = "version: 1\npasses:\n  - visual_prune: {drops: [{after_layr: 2, keep: 0.5}]}";
        assert!(error(drop).contains("after_layer"), "{}", error(drop));
    }

    #[test]
    fn counts_are_integers_or_ratios() {
        let of = |text: &str| serde_yaml::from_str::<Count>(text);
        assert_eq!(of("300").unwrap(), Count::Tokens(300));
        assert_eq!(of("0.5").unwrap(), Count::Ratio(0.5));
        assert_eq!(Count::Ratio(0.7).of(576), 403);
        assert!(of("-1").is_err() && of("1.5").is_err() && of("many").is_err());
    }

    #[test]
    fn order_and_duplicates_are_checked() {
        let merge = "token_merge: {dominant: 3, contextual: 1}";
        let prune = "visual_prune: {drops: [{after_layer: 2, keep: 0.5}]}";
        assert!(Recipe::parse(&format!("version: 1\npasses:\n  - {merge}\n  - {prune}")).is_ok());
        assert!(
            error(&format!("version: 1\npasses:\n  - {prune}\n  - {merge}")).contains("before")
        );
        assert!(error(&format!("version: 1\npasses:\n  - {merge}\n  - {merge}")).contains("twice"));
        assert!(error("version: 2\npasses: []").contains("version 2"));
        assert!(error("version: 1\nmarker: static").contains("span"));
    }
    /// The schema has every pass of the registry, in its order, with the parameters that it reads.
    #[test]
    fn the_schema_follows_the_registry() {
        let schema = include_str!("../../passes/recipe.schema.json");
        let schema: serde_json::Value = serde_json::from_str(schema).unwrap();
        let items = &schema["properties"]["passes"]["items"]["oneOf"];
        let keys = |value: &serde_json::Value| -> Vec<String> {
            value.as_object().unwrap().keys().cloned().collect()
        };
        let mut found: Vec<(String, Vec<String>)> = Vec::new();
        for item in items.as_array().unwrap() {
            let name = keys(&item["properties"]).remove(0);
            let mut parameters = keys(&item["properties"][&name]["properties"]);
            parameters.sort_unstable();
            found.push((name, parameters));
        }
        let want = REGISTRY.iter().map(|e| {
            let mut parameters: Vec<String> = e.keys.iter().map(|k| (*k).to_owned()).collect();
            parameters.sort_unstable();
            (e.name.to_owned(), parameters)
        });
        assert_eq!(found, want.collect::<Vec<_>>());
    }
}
