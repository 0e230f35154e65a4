use super::*;

fn choice(all: usize, dominant: &[usize], anchors: &[usize]) -> Choice {
    let cluster = |anchor: &usize| Cluster {
        anchor: *anchor,
        members: Vec::new(),
    };
    Choice {
        unit: 0,
        plane: all,
        all,
        kept: Some(Kept {
            dominant: dominant.to_vec(),
            contextual: anchors.iter().map(cluster).collect(),
        }),
    }
}

/// Tokens in short: `C` CLS, `5` patch 5, `c5` contextual with anchor 5, `x5` discarded.
fn short(tokens: &[Token]) -> Vec<String> {
    let one = |t: &Token| {
        let at = t.at.first().map_or(0, |s| s.place);
        match t.kind {
            TokenKind::Cls => "C".to_owned(),
            TokenKind::Newline => "n".to_owned(),
            TokenKind::Patch => at.to_string(),
            TokenKind::Contextual(_) => format!("c{at}"),
            TokenKind::Discarded => format!("x{at}"),
        }
    };
    tokens.iter().map(one).collect()
}

#[test]
fn tokens_come_in_the_order_of_each_placement() {
    let merged = choice(8, &[1, 4, 6], &[5, 0]);
    let of = |order, rows| merged.tokens(0, order, rows).map(|t| short(&t));
    assert_eq!(of(Order::Merged, 5).unwrap(), ["1", "4", "6", "c5", "c0"]);
    assert_eq!(
        of(Order::Merged, 6).unwrap(),
        ["C", "1", "4", "6", "c5", "c0"]
    );
    assert_eq!(of(Order::ByPlace, 5).unwrap(), ["c0", "1", "4", "c5", "6"]);
    assert_eq!(
        of(Order::InPlace, 8).unwrap(),
        ["c0", "1", "x2", "x3", "4", "c5", "6", "x7"]
    );
    assert_eq!(of(Order::InPlace, 9).unwrap()[..2], ["C", "c0"]);
    // The encoder gives what no order explains.
    for (order, rows) in [(Order::Merged, 4), (Order::Merged, 7), (Order::ByPlace, 6)] {
        let error = of(order, rows).unwrap_err().to_string();
        assert!(error.contains(&format!("gives {rows} tokens")), "{error}");
    }
    let beyond = choice(8, &[8], &[]).tokens(0, Order::Merged, 1);
    assert!(beyond.unwrap_err().to_string().contains("token 8"));
}

/// What a drop point keeps is counted among what was left before it, text included.
#[test]
fn drops_are_followed_back_to_what_entered() {
    // Text, three tokens of an image, text, two of another, text.
    let visual = [false, true, true, true, false, true, true, false];
    let drop = |after_layer, kept: &[usize]| Drop {
        pass: "visual_prune",
        after_layer,
        kept: kept.to_vec(),
    };
    let drops = [drop(2, &[0, 1, 3, 4, 6, 7]), drop(5, &[0, 2, 3, 4, 5])];
    let found = stages(&visual, Some("token_merge"), &drops, Some(8)).unwrap();
    let tokens: Vec<_> = found.iter().map(|s| s.tokens.clone()).collect();
    assert_eq!(
        tokens,
        [
            None,
            Some(vec![0, 1, 2, 3, 4]),
            Some(vec![0, 2, 4]),
            Some(vec![2, 4])
        ]
    );
    let layers: Vec<_> = found.iter().map(|s| s.layers.map(Layers::text)).collect();
    let layers: Vec<_> = layers.iter().map(Option::as_deref).collect();
    assert_eq!(layers, [None, Some("1–2"), Some("3–5"), Some("6–8")]);
    // Nothing but what the encoder gives, and no depth.
    let found = stages(&visual, None, &drops[..1], None).unwrap();
    assert_eq!(found.len(), 2);
    let layers = found.iter().filter_map(|s| s.layers).map(Layers::text);
    assert_eq!(layers.collect::<Vec<_>>(), ["1–2", "3–"]);
    let error = stages(&visual, None, &[drop(2, &[8])], None).unwrap_err();
    assert!(error.to_string().contains("8 were left"), "{error}");
}

#[test]
fn grids_are_those_of_square_patches() {
    // CLIP, SigLIP (whose last pixels no patch covers), shuffled patches, a wide image.
    assert_eq!(grid_of(576, 336, 336), Some([24, 24, 14]));
    assert_eq!(grid_of(729, 384, 384), Some([27, 27, 14]));
    assert_eq!(grid_of(64, 512, 512), Some([8, 8, 64]));
    assert_eq!(grid_of(288, 168, 336), Some([12, 24, 14]));
    for (count, height, width) in [(577, 336, 336), (600, 336, 336), (205, 336, 336)] {
        assert_eq!(grid_of(count, height, width), None, "{count}");
    }
}
