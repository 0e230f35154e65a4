use std::path::Path;

use image::DynamicImage;
use serde_json::{Value as Json, json};

use super::pixels::to_rgb;
use super::*;

// The expected numbers were made with Pillow 13.0 and, from there on, Transformers 5.22.
const NEAREST: [u8; 60] = [
    145, 198, 251, 65, 118, 171, 197, 250, 47, 73, 126, 179, 249, 46, 99, 213, 10, 63, 217, 14, 67,
    156, 209, 6, 95, 148, 201, 99, 152, 205, 133, 186, 239, 249, 46, 99, 16, 69, 122, 39, 92, 145,
    155, 208, 5, 201, 254, 51, 145, 198, 251, 231, 28, 81, 61, 114, 167, 5, 58, 111,
];
const LANCZOS: [u8; 60] = [
    121, 138, 143, 134, 141, 120, 132, 140, 127, 138, 140, 124, 141, 108, 125, 140, 119, 129, 125,
    119, 109, 144, 136, 136, 121, 135, 117, 140, 127, 135, 137, 137, 137, 138, 134, 115, 115, 146,
    130, 115, 132, 137, 137, 100, 107, 138, 164, 109, 92, 139, 128, 132, 111, 148, 145, 113, 132,
    115, 110, 134,
];
const BILINEAR: [u8; 60] = [
    127, 137, 141, 130, 139, 122, 134, 140, 125, 135, 137, 123, 142, 112, 125, 137, 120, 131, 128,
    123, 115, 137, 131, 129, 124, 135, 119, 135, 126, 132, 137, 137, 133, 133, 136, 118, 119, 142,
    130, 121, 128, 135, 136, 107, 113, 135, 159, 115, 100, 138, 129, 131, 116, 141, 139, 115, 134,
    116, 110, 134,
];
const BICUBIC: [u8; 60] = [
    124, 138, 141, 132, 141, 121, 132, 140, 127, 138, 140, 123, 142, 109, 126, 139, 118, 132, 126,
    120, 111, 141, 132, 132, 122, 136, 117, 137, 126, 134, 138, 137, 136, 136, 136, 116, 116, 146,
    129, 118, 128, 138, 137, 103, 110, 138, 163, 111, 95, 138, 129, 132, 113, 145, 143, 113, 134,
    115, 109, 135,
];
const HAMMING: [u8; 60] = [
    130, 142, 143, 130, 143, 123, 132, 142, 124, 134, 142, 123, 147, 108, 122, 137, 114, 138, 124,
    116, 110, 142, 126, 123, 121, 140, 113, 131, 125, 136, 135, 134, 140, 135, 138, 117, 112, 147,
    128, 123, 122, 138, 138, 106, 111, 137, 165, 115, 92, 138, 131, 137, 114, 140, 142, 116, 133,
    111, 108, 140,
];
const BICUBIC_UP: [u8; 63] = [
    0, 42, 95, 0, 49, 102, 11, 64, 116, 30, 83, 136, 49, 102, 162, 64, 117, 185, 70, 123, 195, 49,
    100, 153, 54, 107, 161, 71, 124, 185, 91, 144, 197, 112, 165, 162, 128, 181, 118, 136, 189,
    102, 103, 157, 210, 112, 165, 220, 130, 183, 254, 152, 205, 255, 174, 227, 161, 192, 245, 51,
    201, 254, 8,
];
/// `CLIPImageProcessorPil(size=6, crop_size=4×5)` on [`sample`]`(17, 13)`.
const CLIP: [f32; 60] = [
    0.00334391, 0.193124, 0.441297, 0.382903, -0.0404514, 0.0325408, 0.0909346, 0.309911,
    -0.274026, 0.178525, 0.193124, 0.251517, -0.201034, -0.0842466, -0.0696482, -0.0988451,
    0.13473, -0.0842466, 0.00334391, 0.0909346, 0.0188195, 0.424029, 0.409022, 0.363998, -0.011196,
    -0.176281, 0.0488351, -0.0262038, 0.529084, 0.153889, 0.363998, 0.424029, 0.439037, 0.544091,
    -0.161274, 0.61913, -0.101243, 0.363998, 0.138882, -0.0712271, -0.115093, 0.382609, 0.425269,
    0.268848, 0.55325, 0.183528, 0.112428, 0.339949, 0.382609, -0.157754, 0.112428, 0.283068,
    0.482149, 0.482149, 0.453709, -0.0439931, 0.53903, 0.0413273, 0.58169, 0.226188,
];
/// A 4×3 palette PNG with a transparent entry.
const PALETTE_PNG: [u8; 125] = [
    137, 80, 78, 71, 13, 10, 26, 10, 0, 0, 0, 13, 73, 72, 68, 82, 0, 0, 0, 4, 0, 0, 0, 3, 4, 3, 0,
    0, 0, 70, 218, 179, 245, 0, 0, 0, 24, 80, 76, 84, 69, 196, 249, 46, 145, 198, 251, 111, 164,
    217, 100, 153, 206, 74, 127, 180, 243, 40, 93, 48, 101, 154, 19, 72, 125, 86, 53, 34, 219, 0,
    0, 0, 3, 116, 82, 78, 83, 255, 255, 0, 215, 202, 13, 65, 0, 0, 0, 17, 73, 68, 65, 84, 120, 156,
    99, 44, 59, 195, 96, 200, 202, 200, 26, 7, 0, 10, 202, 1, 222, 119, 248, 2, 254, 0, 0, 0, 0,
    73, 69, 78, 68, 174, 66, 96, 130,
];
const PALETTE_RGB: [u8; 36] = [
    19, 72, 125, 48, 101, 154, 74, 127, 180, 111, 164, 217, 100, 153, 206, 145, 198, 251, 196, 249,
    46, 243, 40, 93, 196, 249, 46, 243, 40, 93, 48, 101, 154, 100, 153, 206,
];

fn sample(width: usize, height: usize) -> Pixels {
    let mut rgb = Vec::new();
    for y in 0..height {
        for x in 0..width {
            rgb.extend((0..3).map(|c| ((x * 37 + y * 101 + c * 53 + x * y * 7) % 256) as u8));
        }
    }
    Pixels::new(width, height, rgb).unwrap()
}

fn difference(a: &[u8], b: &[u8]) -> u8 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a.abs_diff(*b)).max().unwrap()
}

#[test]
fn resizes_like_pillow() {
    let cases: [(Resample, &[u8], u8); 5] = [
        (Resample::Nearest, &NEAREST, 0),
        (Resample::Lanczos, &LANCZOS, 1),
        (Resample::Bilinear, &BILINEAR, 1),
        (Resample::Bicubic, &BICUBIC, 1),
        (Resample::Hamming, &HAMMING, 1),
    ];
    for (resample, expected, tolerance) in cases {
        let resized = sample(17, 13).resize(5, 4, resample).unwrap();
        let found = difference(resized.rgb(), expected);
        assert!(found <= tolerance, "{resample:?}: {found}");
    }
    let corner = Pixels::new(
        3,
        2,
        sample(17, 13)
            .rgb
            .chunks(17 * 3)
            .take(2)
            .flat_map(|row| row[..9].to_vec())
            .collect(),
    )
    .unwrap();
    let enlarged = corner.resize(7, 3, Resample::Bicubic).unwrap();
    assert!(difference(enlarged.rgb(), &BICUBIC_UP) <= 1);
}

#[test]
fn pixel_values_are_those_of_transformers() {
    let config = json!({
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 6},
        "crop_size": {"height": 4, "width": 5},
    });
    let processor = ImageProcessor::from_json(&config, Path::new("x.json")).unwrap();
    assert_eq!(processor.output_size(), Some((4, 5)));
    let values = processor.process(&sample(17, 13)).unwrap();
    assert_eq!(values.shape(), [3, 4, 5]);
    // One step of 255, in units of the normalised value.
    let step = 1.0 / 255.0 / 0.261_302_6;
    for (found, expected) in values.iter().zip(CLIP) {
        assert!(
            (found - expected).abs() <= 1.01 * step,
            "{found} {expected}"
        );
    }
    let same = values
        .iter()
        .zip(CLIP)
        .filter(|(a, b)| (*a - b).abs() < 1e-5)
        .count();
    assert!(same >= 50, "only {same} of 60 values are the same");
}

#[test]
fn palette_and_transparency_convert_as_in_pillow() {
    let image = Pixels::decode(&PALETTE_PNG, "palette").unwrap();
    assert_eq!((image.width(), image.height()), (4, 3));
    assert_eq!(image.rgb(), PALETTE_RGB);
}

#[test]
fn grey_alpha_and_deep_images_convert_as_in_pillow() {
    use image::{ImageBuffer, LumaA, Rgba};
    let grey = ImageBuffer::from_raw(2, 1, vec![7u8, 200]).unwrap();
    assert_eq!(
        to_rgb(DynamicImage::ImageLuma8(grey)),
        [7, 7, 7, 200, 200, 200]
    );
    let alpha = ImageBuffer::<LumaA<u8>, _>::from_raw(1, 1, vec![9u8, 0]).unwrap();
    assert_eq!(to_rgb(DynamicImage::ImageLumaA8(alpha)), [9, 9, 9]);
    let rgba = ImageBuffer::<Rgba<u8>, _>::from_raw(1, 1, vec![1u8, 2, 3, 0]).unwrap();
    assert_eq!(to_rgb(DynamicImage::ImageRgba8(rgba)), [1, 2, 3]);
    let deep = ImageBuffer::from_raw(3, 1, vec![100u16, 256, 65535]).unwrap();
    let expected = [100, 100, 100, 255, 255, 255, 255, 255, 255];
    assert_eq!(to_rgb(DynamicImage::ImageLuma16(deep)), expected);
    let deep = ImageBuffer::from_raw(1, 1, vec![255u16, 256, 65535]).unwrap();
    assert_eq!(to_rgb(DynamicImage::ImageRgb16(deep)), [0, 1, 255]);
}

#[test]
fn crops_like_transformers() {
    let image = Pixels::new(5, 3, (1..=15).flat_map(|v| [v; 3]).collect()).unwrap();
    let crop = |height, width| -> Vec<Vec<u8>> {
        let cut = image.center_crop(width, height);
        cut.rgb
            .chunks(width * 3)
            .map(|row| row.iter().step_by(3).copied().collect())
            .collect()
    };
    assert_eq!(crop(2, 2), [[2, 3], [7, 8]]);
    assert_eq!(crop(3, 4), [[1, 2, 3, 4], [6, 7, 8, 9], [11, 12, 13, 14]]);
    assert_eq!(crop(3, 3), [[2, 3, 4], [7, 8, 9], [12, 13, 14]]);
    assert_eq!(
        crop(6, 2),
        [[0, 0], [0, 0], [2, 3], [7, 8], [12, 13], [0, 0]]
    );
    assert_eq!(crop(4, 6)[1], [0, 1, 2, 3, 4, 5]);
    assert_eq!(crop(4, 6)[0], [0; 6]);
    assert_eq!(crop(5, 8)[3], [0, 0, 11, 12, 13, 14, 15, 0]);
}

#[test]
fn shortest_edge_is_truncated_like_int() {
    assert_eq!(Size::ShortestEdge(336).of(333, 97).unwrap(), (1153, 336));
    assert_eq!(Size::ShortestEdge(126).of(200, 301).unwrap(), (126, 189));
    assert_eq!(Size::ShortestEdge(126).of(50, 50).unwrap(), (126, 126));
}

#[test]
fn bad_configurations_are_named() {
    let error = |config: Json| {
        ImageProcessor::from_json(&config, Path::new("x.json"))
            .unwrap_err()
            .to_string()
    };
    let kind = "image_processor_type";
    let found = error(json!({kind: "PixtralImageProcessor"}));
    assert!(
        found.contains("PixtralImageProcessor") && found.contains("x.json"),
        "{found}"
    );
    assert!(error(json!({})).contains(kind));
    let clip = "CLIPImageProcessor";
    assert!(error(json!({kind: clip, "resample": 9})).contains("`resample` is 9"));
    assert!(error(json!({kind: clip, "size": {"longest_edge": 9}})).contains("`size`"));
    assert!(error(json!({kind: clip, "image_mean": [1, 2]})).contains("three numbers"));
    assert!(error(json!({kind: clip, "do_resize": "yes"})).contains("true or false"));
}

#[test]
fn bad_images_are_errors() {
    assert!(Pixels::new(2, 2, vec![0; 11]).is_err());
    assert!(Pixels::new(0, 2, vec![]).is_err());
    let error = Pixels::decode(b"hello", "x.png").unwrap_err().to_string();
    assert!(error.contains("x.png"), "{error}");
    assert!(Pixels::decode(&PALETTE_PNG[..80], "cut").is_err());
    assert!(
        sample(1, 1)
            .resize(1 << 20, 1 << 20, Resample::Bicubic)
            .is_err()
    );
    assert!(sample(2, 2).resize(0, 1, Resample::Bicubic).is_err());
}

#[test]
fn configurations_are_found_in_both_places() {
    let dir = tempfile::tempdir().unwrap();
    let error = ImageProcessor::from_dir(dir.path())
        .unwrap_err()
        .to_string();
    assert!(error.contains("preprocessor_config.json"), "{error}");
    let nested = json!({"image_processor": {"image_processor_type": "CLIPImageProcessorFast",
                                             "size": 30, "do_center_crop": false}});
    std::fs::write(dir.path().join("processor_config.json"), nested.to_string()).unwrap();
    let processor = ImageProcessor::from_dir(dir.path()).unwrap();
    assert_eq!(processor.output_size(), None);
    let fitted = processor.fit(&sample(17, 13)).unwrap();
    assert_eq!((fitted.width(), fitted.height()), (39, 30));
}

/// The project's pictures, as Transformers' `CLIPImageProcessorPil` crops them before rescaling.
#[test]
fn recorded_pictures_come_out_within_two() {
    let models = crate::runtime::test_models::models_dir();
    let bytes =
        crate::runtime::test_models::stored(&models.join("goldens/preprocess.safetensors.gz"));
    let goldens = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    for (fixture, size) in [("ts-eager-mha", 126), ("demo", 336)] {
        let processor = ImageProcessor::from_dir(models.join("fixtures").join(fixture)).unwrap();
        for picture in ["street", "shapes"] {
            let image = Pixels::open(models.join(format!("images/{picture}.png"))).unwrap();
            let fitted = processor.fit(&image).unwrap();
            assert_eq!((fitted.height(), fitted.width()), (size, size));
            let expected = goldens.tensor(&format!("{picture}.{size}")).unwrap();
            // Channels come first there.
            let planes: Vec<u8> = (0..3)
                .flat_map(|channel| fitted.rgb().iter().skip(channel).step_by(3).copied())
                .collect();
            let found = difference(&planes, expected.data());
            assert!(found <= 2, "{picture} at {size}: {found} of 255");
            let pairs = planes.iter().zip(expected.data());
            let others = pairs.filter(|(a, b)| a != b).count();
            assert!(
                others * 100 < planes.len(),
                "{picture} at {size}: {others} differ"
            );
        }
    }
}
