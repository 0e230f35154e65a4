use std::path::{Path, PathBuf};
fn main() {
    let a: Vec<String> = std::env::args().collect();
    let dir = duet_onnx::onnx::ModelDir::open(Path::new(&a[1])).unwrap();
    let recipe = duet_onnx::passes::Recipe::parse(&std::fs::read_to_string(&a[2]).unwrap()).unwrap();
    let models: Vec<(PathBuf, String, duet_onnx::ir::Model)> = dir.files.iter().map(|f| (f.relative.clone(), f.variant.clone(), duet_onnx::onnx::read(&dir.path(f)).unwrap())).collect();
    let vlm = duet_onnx::arch::Vlm::new(models);
    let r = match duet_onnx::passes::rewrite(vlm, &recipe) { Ok(r) => r, Err(e) => { eprintln!("{e}"); std::process::exit(2) } };
    for c in &r.changes { println!("{} {} {}", c.pass, r.vlm.parts[c.part].file.display(), c.inserted); }
    let mut out = duet_onnx::onnx::Outputs::default();
    for p in &r.vlm.parts { out.models.push((p.file.clone(), duet_onnx::onnx::serialize(duet_onnx::ir::verify(&p.model).unwrap()))); }
    duet_onnx::onnx::write_out(&dir, &out, Path::new(&a[3]), Default::default()).unwrap();
}
