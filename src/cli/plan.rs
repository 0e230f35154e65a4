//! `duet plan`

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use serde_json::json;

use super::counts::{self, LayerTable, Seen};
use super::{Global, ModelArgument, Outcome, calibrate, family, load, print_json, style};
use crate::arch::{VisionTower, Vlm};
use crate::passes::{
    BudgetShape, Method, Placement, Planned, Style, placement_in, plan, plan_share,
};
use crate::runtime::ImageProcessor;

/// Most tokens and crops of an image that are counted with.
const MOST: i64 = 1_000_000_000;

/// Arguments of `duet plan`.
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("target").required(true))]
pub(super) struct Arguments {
    #[command(flatten)]
    model: ModelArgument,
    /// Visual tokens that a decoder layer may see on average
    #[arg(long, group = "target", value_name = "TOKENS")]
    budget: Option<f64>,
    /// Share of the visual tokens to save, as in 67%
    #[arg(long, group = "target", value_name = "PERCENT", value_parser = percent)]
    reduction: Option<f64>,
    /// Visual tokens of an image, for models where its size decides (Qwen2-VL)
    #[arg(long, group = "image", value_name = "N", value_parser = clap::value_parser!(i64).range(1..=MOST))]
    tokens: Option<i64>,
    /// Size of an image, as in 1280x720, for models where it decides how many tokens or crops it has
    #[arg(long, group = "image", value_name = "WxH", value_parser = image_size)]
    image_size: Option<(usize, usize)>,
    /// Crops of an image, the base crop counted, for models of several crops (LLaVA-NeXT)
    #[arg(long, group = "image", value_name = "N", value_parser = clap::value_parser!(i64).range(1..=MOST))]
    crops: Option<i64>,
    /// Whose method the recipe follows, at the same budget
    #[arg(long, value_name = "METHOD", default_value = "duet", value_parser = methods())]
    method: Method,
    /// Write the recipe to a file that does not exist yet
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Print one JSON document that holds the recipe
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    calibrate: calibrate::Arguments,
}

/// The names of methods, with what `--help` says of each.
fn methods() -> impl TypedValueParser<Value = Method> {
    let each = Method::ALL
        .iter()
        .map(|m| PossibleValue::new(m.name()).help(m.about()));
    PossibleValuesParser::new(each).map(|name| Method::named(&name).unwrap_or_default())
}

/// `1280x720`: (width, height).
pub(super) fn image_size(text: &str) -> Result<(usize, usize), String> {
    let side = |s: &str| s.trim().parse().ok().filter(|n| (1..=1 << 20).contains(n));
    let sides = text.split_once(['x', 'X', '×']);
    sides
        .and_then(|(w, h)| Some((side(w)?, side(h)?)))
        .ok_or_else(|| format!("'{text}' is no size of an image; expected 1280x720"))
}

/// `67%` or `67` or `0.67`.
fn percent(text: &str) -> Result<f64, String> {
    let (number, percent) = match text.strip_suffix('%') {
        Some(number) => (number, true),
        None => (text, false),
    };
    let value: f64 = number
        .trim()
        .parse()
        .map_err(|_| format!("'{text}' is no number; expected 67%"))?;
    let share = if percent || value > 1.0 {
        value / 100.0
    } else {
        value
    };
    if share > 0.0 && share < 1.0 {
        Ok(share)
    } else {
        Err(format!(
            "{text} is no reduction; expected more than 0% and less than 100%"
        ))
    }
}

/// What a budget is for.
struct Target {
    shape: BudgetShape,
    /// For people: `an image`, `a clip of 8 frames`.
    of: String,
}

pub(super) fn run(arguments: &Arguments, global: &Global) -> anyhow::Result<Outcome> {
    let path = &arguments.model.path;
    let load::Selected { dir, vlm, .. } = load::select(path, &[], global)?;
    if arguments.calibrate.dataset().is_some() && arguments.method != Method::Duet {
        bail!(
            "--calibrate searches make-ups of a merge and drops; with --method {} there is nothing to search, leave \
             one of them out",
            arguments.method.name()
        );
    }
    let target =
        target(&dir.root, &vlm, arguments).with_context(|| format!("{}", path.display()))?;
    let shape = target.shape;
    let all = shape.visual_tokens();
    let fail = |problem: String| anyhow::anyhow!("{}: {problem}", path.display());
    let mut searched = None;
    let (recipe, table) = match (arguments.budget, arguments.reduction, all) {
        (None, None, _) => bail!("name --budget or --reduction"),
        (None, Some(reduction), None) => {
            if arguments.calibrate.dataset().is_some() {
                bail!(
                    "--calibrate: how many tokens an image has is not known; say it (--tokens or --image-size)"
                );
            }
            let planned = plan_share(shape, 1.0 - reduction).map_err(fail)?;
            let table = LayerTable {
                of: target.of,
                before: None,
                after: Seen::Shares(planned.shares),
                all_at_first: false,
            };
            (planned.recipe, table)
        }
        (budget, reduction, all) => {
            let share = 1.0 - reduction.unwrap_or(0.0);
            let budget = budget.unwrap_or(all.unwrap_or(0) as f64 * share);
            let mut planned = plan(shape, budget).map_err(fail)?;
            if arguments.calibrate.dataset().is_some() {
                let first = planned.recipe.as_str();
                let found =
                    calibrate::run(path, &shape, budget, first, &arguments.calibrate, global)?;
                planned = Planned {
                    tokens: found.tokens,
                    average: found.average,
                    recipe: found.recipe,
                };
                searched = Some(found.document);
            }
            let of = match all {
                Some(_) => target.of,
                None => format!("an image of {} tokens or more", planned.tokens[0]),
            };
            let table = LayerTable {
                of,
                before: all.map(|all| vec![all; shape.layers.max(1)]),
                after: Seen::Tokens(planned.tokens),
                // How many that is was counted where it is known.
                all_at_first: all.is_none() && shape.placed,
            };
            (planned.recipe, table)
        }
    };
    if let Some(file) = &arguments.output {
        let mut target = std::fs::File::create_new(file)
            .with_context(|| format!("writing {}", file.display()))?;
        target
            .write_all(recipe.as_bytes())
            .with_context(|| format!("writing {}", file.display()))?;
    }
    let saved = cache_saved(&vlm, &table);
    if arguments.json {
        print_json(&json!({
            "schema_version": 1,
            "recipe": recipe,
            "visual_tokens": table.json(),
            "cache_bytes_saved": saved,
            "search": searched,
        }))?;
    } else if arguments.output.is_none() {
        anstream::print!("{recipe}");
    }
    global.say(table.line());
    if let Some(saved) = saved {
        let one = ["an ", "a "].iter().find_map(|a| table.of.strip_prefix(a));
        global.say(format!(
            "key/value cache: {} fewer for each {}",
            style::bytes(saved),
            one.unwrap_or(&table.of)
        ));
    }
    Ok(Outcome::Done)
}

/// Bytes of the cache that a recipe saves for what the table is of.
fn cache_saved(vlm: &Vlm, table: &LayerTable) -> Option<u64> {
    let (Some(before), Seen::Tokens(after)) = (&table.before, &table.after) else {
        return None;
    };
    let (_, decoder) = vlm.decoders().next()?;
    let width = i64::try_from(decoder.dtype.byte_len(1).unwrap_or(4)).ok()?;
    let row = 2 * decoder.kv_heads * decoder.head_dim * width;
    let fewer = before.iter().zip(after).map(|(b, a)| i128::from(b - a));
    u64::try_from(fewer.sum::<i128>() * i128::from(row)).ok()
}

/// What there is to merge and to prune.
fn target(root: &Path, vlm: &Vlm, arguments: &Arguments) -> anyhow::Result<Target> {
    let decoder = vlm.decoders().next().map(|(_, d)| d);
    let layers = decoder.map_or(0, |d| d.depth());
    let rows = decoder.and_then(|d| d.position_rows);
    // Of a model that takes both, clips are what is long.
    let tower = vlm
        .towers()
        .find(|(_, t)| t.video)
        .or_else(|| vlm.towers().next());
    let tower = tower.map(|(_, t)| t);
    let counted = tower.and_then(VisionTower::candidates);
    let (Some(tower), Some(patches)) = (tower, counted) else {
        if rows.is_none() && arguments.tokens.is_none() {
            match tower {
                Some(_) => bail!(
                    "the number of patch tokens is not fixed in the file; say how many an image has (--tokens), or \
                     write a recipe with ratios"
                ),
                None => bail!(
                    "no vision encoder was recognised, so the number of visual tokens is not known; give the whole \
                     model directory (duet inspect says what is recognised), or say how many an image has (--tokens)"
                ),
            }
        }
        let placed = placement_in(None, vlm) == Placement::Decoder;
        return open(root, tower, (layers, placed), arguments);
    };
    if arguments.tokens.is_some() {
        bail!("--tokens: the file fixes the number of tokens, {patches} patches for each image");
    }
    let features = tower.features_per_image();
    let crops = family::crops(root, vlm).filter(|_| !tower.video);
    let (images, style, of) = match (tower.video, crops) {
        (true, _) => {
            let frames = counts::frames(tower);
            (frames, Style::Clip, format!("a clip of {frames} frames"))
        }
        (false, Some(usual)) => {
            let images = match (arguments.crops, arguments.image_size) {
                (Some(crops), _) => crops,
                (None, Some((width, height))) => {
                    let count = ImageProcessor::from_dir(root)?.crop_count(height, width);
                    i64::try_from(count)?
                }
                (None, None) => usual,
            };
            (images, Style::Crops, format!("an image of {images} crops"))
        }
        (false, None) => (1, Style::Image, "an image".to_owned()),
    };
    if crops.is_none() && (arguments.crops.is_some() || arguments.image_size.is_some()) {
        let what = if tower.video { "frame" } else { "image" };
        bail!("this model sees every {what} in one crop of {patches} patches, whatever its size");
    }
    Ok(Target {
        shape: BudgetShape {
            patches: Some(patches),
            cls: tower.cls,
            features,
            images,
            merges: tower.grid.is_none(),
            layers,
            style,
            placed: placement_in(None, vlm) == Placement::Decoder,
            method: arguments.method,
        },
        of,
    })
}

/// The same where only the run, or the user, tells how many tokens an image has.
fn open(
    root: &Path,
    tower: Option<&VisionTower>,
    (layers, placed): (usize, bool),
    arguments: &Arguments,
) -> anyhow::Result<Target> {
    if arguments.crops.is_some() {
        bail!("--crops: this model does not cut images into crops; use --tokens or --image-size");
    }
    let tokens = match (arguments.tokens, arguments.image_size) {
        (Some(tokens), _) => Some(tokens),
        (None, Some(size)) => Some(grid_tokens(root, size)?),
        (None, None) => None,
    };
    Ok(Target {
        shape: BudgetShape {
            patches: tokens,
            cls: tower.is_some_and(|t| t.cls),
            features: tokens,
            images: 1,
            merges: tower.is_some_and(|t| t.grid.is_none()),
            layers,
            style: Style::Grid,
            // What `placement` means where it is left out: clients count on a grid's tokens.
            placed: placed && tower.is_some(),
            method: arguments.method,
        },
        of: tokens.map_or("an image".into(), |n| format!("an image of {n} tokens")),
    })
}

/// Tokens of an image of (width, height) as the model's processor cuts it; without a
/// configuration, as Qwen2-VL's does where its configuration is silent.
fn grid_tokens(root: &Path, (width, height): (usize, usize)) -> anyhow::Result<i64> {
    let path = root.join("preprocessor_config.json");
    let processor = match path.exists() {
        true => ImageProcessor::from_dir(root)?,
        false => {
            let usual = json!({ "image_processor_type": "Qwen2VLImageProcessor" });
            ImageProcessor::from_json(&usual, &path)?
        }
    };
    Ok(i64::try_from(processor.token_count(height, width)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers of Transformers' `smart_resize` over 28 × 28.
    #[test]
    fn tokens_of_an_image_are_those_of_the_processor() {
        let dir = tempfile::tempdir().unwrap();
        for (size, tokens) in [
            ((640, 480), 23 * 17),
            ((1280, 720), 46 * 26),
            ((4000, 3000), 41 * 30),
            ((20, 20), 4),
            ((42, 1000), 36 * 2),
        ] {
            assert_eq!(grid_tokens(dir.path(), size).unwrap(), tokens, "{size:?}");
        }
        let bounds = json!({
            "image_processor_type": "Qwen2VLImageProcessor",
            "patch_size": 4,
            "merge_size": 2,
            // In pixels, in spite of their names.
            "size": { "shortest_edge": 64, "longest_edge": 4096 },
        });
        let bounds = bounds.to_string();
        std::fs::write(dir.path().join("preprocessor_config.json"), bounds).unwrap();
        assert_eq!(grid_tokens(dir.path(), (400, 300)).unwrap(), 9 * 6);
        assert!(grid_tokens(dir.path(), (4000, 10)).is_err());
    }

    #[test]
    fn sizes_of_images_are_width_and_height() {
        assert_eq!(image_size("1280x720"), Ok((1280, 720)));
        for wrong in ["1280", "0x3", "1x-1", "x", "99999999x2"] {
            assert!(image_size(wrong).is_err(), "{wrong}");
        }
    }
}
