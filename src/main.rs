fn main() {
    for path in std::env::args().skip(1) {
        let m = duet_onnx::onnx::read(std::path::Path::new(&path)).unwrap();
        duet_onnx::ir::verify(&m).unwrap();
        match duet_onnx::arch::Role::of(&m) {
            duet_onnx::arch::Role::Vision(t) => println!("{path}: vision layers {} heads {} hd {} tokens {:?} cls {} scale {} hidden {} entry {}", t.layers, t.heads, t.head_dim, t.tokens, t.cls, t.site.scale(), m.name(t.hidden), m.name(t.entry)),
            duet_onnx::arch::Role::Decoder(d) => println!("{path}: decoder {} heads {:?} kv {} hd {} scale {} b1 {} newk {} q {}", d.depth(), d.heads, d.kv_heads, d.head_dim, d.layers[1].scale, m.name(d.layers[1].boundary), m.name(d.layers[1].new_key), m.name(d.layers[1].query)),
            duet_onnx::arch::Role::Embedding(e) => println!("{path}: embed {:?}", e.width),
            duet_onnx::arch::Role::Unknown(w) => println!("{path}: ??? {w:#?}"),
        }
    }
}
