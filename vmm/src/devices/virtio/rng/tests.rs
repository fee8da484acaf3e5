use super::{
    super::{
        hostile,
        testing::{Bench, Desc},
    },
    *,
};

fn active() -> Bench<Rng> {
    let mut bench = Bench::new(Rng::new().unwrap());
    let features = bench.offered();
    bench.activate(features);
    bench
}

fn request(bench: &mut Bench<Rng>, table: &[Desc]) -> Vec<(u16, u32)> {
    bench.queue(0).table(0, table);
    bench.queue(0).offer(0);
    bench.kick(0).unwrap();
    bench.queue(0).used()
}

fn works(bench: &mut Bench<Rng>) {
    bench.write(0x10_0000, &[0; 64]);
    let used = request(bench, &[Desc::writable(0x10_0000, 60).next(1), Desc::writable(0x10_0100, 4)]);
    assert_eq!(used, [(0, 64)]);
    assert_ne!(bench.read(0x10_0000, 60), [0; 60]);
    // Not a byte more than was asked for.
    assert_eq!(bench.read(0x10_003c, 4), [0; 4]);
}

#[test]
fn buffers_are_filled_and_the_driver_is_told() {
    let mut bench = active();
    works(&mut bench);
    assert!(bench.interrupted());
}

#[test]
fn a_request_is_cut_to_the_limit() {
    let mut bench = active();
    bench.write(0x10_0000, &[7; 0x3000]);
    assert_eq!(request(&mut bench, &[Desc::writable(0x10_0000, 0x3000)]), [(0, MAX_REQUEST as u32)]);
    assert_eq!(bench.read(0x10_0000 + MAX_REQUEST as u64, 0x2000), [7; 0x2000]);
}

#[test]
fn what_cannot_be_written_to_gets_nothing() {
    let mut bench = active();
    assert_eq!(request(&mut bench, &[Desc::readable(0x8000, 64)]), [(0, 0)]);
}

#[test]
fn hostile_drivers_are_survived() {
    hostile::survives_malformed(&mut active(), 0, works);
    hostile::notices_corrupt_rings(0, active);
    hostile::survives_anything(active);
}

#[test]
fn saved_and_restored_in_both_states() {
    let fresh = Bench::new(Rng::new().unwrap());
    let state = fresh.device.save().unwrap();
    let mut other = Bench::new(Rng::new().unwrap());
    other.device.restore(&state, fresh.resources()).unwrap();
    // Inactive: a kick does nothing.
    other.queue(0).offer(0);
    other.kick(0).unwrap();
    assert_eq!(other.queue(0).used(), []);

    let mut bench = active();
    works(&mut bench);
    // Offered, and not kicked before the machine was saved.
    bench.queue(0).table(0, &[Desc::writable(0x10_0000, 32)]);
    bench.queue(0).offer(0);
    let state = bench.device.save().unwrap();
    let resources = bench.resources();
    bench.device = Rng::new().unwrap();
    bench.device.restore(&state, resources).unwrap();
    bench.device.source_event(0).unwrap();
    assert_eq!(bench.queue(0).used(), [(0, 32)]);
    works(&mut bench);
}

#[test]
fn damaged_states_are_refused() {
    let bench = active();
    let state = bench.device.save().unwrap();
    let mut other = Rng::new().unwrap();
    for end in 0..state.len() {
        assert!(other.restore(&state[..end], bench.resources()).is_err(), "cut at {end}");
    }
    let longer: Vec<u8> = state.iter().copied().chain([0]).collect();
    assert!(other.restore(&longer, bench.resources()).is_err());
    let mut another = state.clone();
    another[0] = DeviceType::Block as u8;
    assert!(other.restore(&another, bench.resources()).is_err());
    let mut version = state.clone();
    version[1] = 99;
    assert!(matches!(other.restore(&version, bench.resources()),
        Err(DeviceError::Invalid(message)) if message.contains("version 99")));
    assert!(other.active.is_none());
}
