use super::*;

#[test]
fn steps_are_those_of_numpy() {
    // np.linspace(0, n - 1, 8, dtype=int)
    let cases = [
        (1, [0; 8]),
        (3, [0, 0, 0, 0, 1, 1, 1, 2]),
        (8, [0, 1, 2, 3, 4, 5, 6, 7]),
        (20, [0, 2, 5, 8, 10, 13, 16, 19]),
        (29, [0, 4, 8, 12, 16, 20, 24, 28]),
        (300, [0, 42, 85, 128, 170, 213, 256, 299]),
    ];
    for (total, want) in cases {
        assert_eq!(even_steps(total, 8), want, "{total} frames");
    }
    assert_eq!(even_steps(0, 8), Vec::<usize>::new());
    assert_eq!(even_steps(9, 1), [0]);
}
