// SPDX-License-Identifier: MIT OR Apache-2.0
//! `hostile-virtio CASE`: one attack on the crate's driver; prints in one line what came of it. A panic is a panic of
//! the crate. Without an argument it lists the cases. Numbers are those of the project's list of attacks.

mod device;
mod hal;

use std::ptr::NonNull;
use std::sync::atomic::Ordering;
use std::time::Duration;

use device::{
    ACCESS_PLATFORM, Bus, DATA, Device, EVENT_IDX, FLUSH, HONEST, INDIRECT, Queue, READ_ONLY,
    RING_PACKED, Request, VERSION_1, perform,
};
use hal::{IN_PLACE, Memory, ledger};
use virtio_drivers::device::blk::{BlkReq, BlkResp, SECTOR_SIZE, VirtIOBlk};
use virtio_drivers::queue::{OwningQueue, VirtQueue};
use virtio_drivers::transport::mmio::{MmioTransport, VirtIOHeader};
use virtio_drivers::transport::{DeviceStatus, Transport};

type Blk = VirtIOBlk<Memory, Bus>;

const CASES: &[(&str, fn())] = &[
    ("honest", honest),
    ("1-stale-entry", stale_entry),
    ("2-identifier-beyond-ring", || identifier(|_| 200)),
    (
        "2-identifier-beyond-ring-asynchronous",
        beyond_ring_asynchronous,
    ),
    ("3-upper-bits", || identifier(|head| head | 0x8000_0000)),
    ("4-one-bad-identifier", one_bad_identifier),
    ("5-twice-asynchronous", twice_asynchronous),
    ("5-too-long-in-owned-buffer", too_long_in_owned_buffer),
    ("6-length-too-large", || length(|_| u32::MAX)),
    ("7-nothing-written", nothing_written),
    ("9-unknown-status", unknown_status),
    ("11-descriptors-overwritten", descriptors_overwritten),
    ("12-indirect-table-overwritten", indirect_table_overwritten),
    ("14-features-not-kept", features_not_kept),
    ("15-no-version-1", || {
        offered(HONEST & !VERSION_1, VERSION_1)
    }),
    ("15-legacy-registers", legacy_registers),
    ("16-access-platform", || offered(HONEST, ACCESS_PLATFORM)),
    ("17-read-only", read_only),
    ("17-no-flush", no_flush),
    ("19-restless-configuration", restless),
    ("20-beyond-capacity", beyond_capacity),
    ("23-small-queue", small_queue),
    ("25-reset-not-done", reset_not_done),
    ("26-needs-reset", needs_reset),
    ("27-no-completion", no_completion),
    ("29-kick-at-the-wrap", kick_at_the_wrap),
    ("35-packed", || offered(HONEST, RING_PACKED)),
];

fn main() {
    let Some(wanted) = std::env::args().nth(1) else {
        return CASES.iter().for_each(|(name, _)| println!("{name}"));
    };
    match CASES.iter().find(|(name, _)| *name == wanted) {
        Some((_, run)) => run(),
        None => panic!("there is no such case"),
    }
}

fn push(queue: &mut Queue, request: Request) {
    perform(&request);
    queue.push(&request);
}

fn disk(bus: &Bus) -> Blk {
    Blk::new(bus.clone()).expect("the driver does not start")
}

fn sector(blk: &mut Blk) -> (virtio_drivers::Result, [u8; SECTOR_SIZE]) {
    let mut data = [0x11; SECTOR_SIZE];
    (blk.read_blocks(0, &mut data), data)
}

fn right(data: &[u8]) -> &'static str {
    if data.iter().all(|&byte| byte == DATA) {
        "right contents"
    } else {
        "wrong contents"
    }
}

fn honest() {
    let mut blk = disk(&Device::new(HONEST | INDIRECT | EVENT_IDX, push));
    let (result, data) = sector(&mut blk);
    println!(
        "{result:?}, {}, lent {}",
        right(&data),
        ledger(|ledger| ledger.lent.len())
    );
}

fn stale_entry() {
    let bus = Device::new(HONEST, |queue, request| {
        perform(&request);
        queue.put(request.head.into(), request.written);
        queue.publish(queue.used.wrapping_add(1));
    });
    let mut blk = disk(&bus);
    let (first, _) = sector(&mut blk);
    // From here on the device does nothing at all.
    bus.0.borrow_mut().complete = Box::new(|_, _| ());
    let (second, data) = sector(&mut blk);
    println!(
        "{first:?}, then without the device {second:?}, {}",
        right(&data)
    );
}

fn identifier(choose: fn(u32) -> u32) {
    let bus = Device::new(HONEST, move |queue, request| {
        perform(&request);
        queue.put(choose(request.head.into()), request.written);
        queue.publish(queue.used);
    });
    println!("{:?}", sector(&mut disk(&bus)).0);
}

fn length(choose: fn(u32) -> u32) {
    let bus = Device::new(HONEST, move |queue, request| {
        perform(&request);
        queue.put(request.head.into(), choose(request.written));
        queue.publish(queue.used);
    });
    println!("{:?}", sector(&mut disk(&bus)).0);
}

fn beyond_ring_asynchronous() {
    let bus = Device::new(HONEST, |queue, _| {
        queue.put(200, 1);
        queue.publish(queue.used);
    });
    let mut blk = disk(&bus);
    let (mut request, mut data, mut response) =
        (BlkReq::default(), [0; SECTOR_SIZE], BlkResp::default());
    unsafe { blk.read_blocks_nb(0, &mut request, &mut data, &mut response) }.unwrap();
    let token = blk.peek_used().unwrap();
    println!("the caller is given token {token}");
    let result = unsafe { blk.complete_read_blocks(token, &request, &mut data, &mut response) };
    println!("{result:?}");
}

fn one_bad_identifier() {
    let bus = Device::new(HONEST, |queue, request| {
        perform(&request);
        queue.put(request.head as u32 + 1, request.written);
        queue.publish(queue.used);
    });
    let mut blk = disk(&bus);
    let first = sector(&mut blk).0;
    bus.0.borrow_mut().complete = Box::new(push);
    let (second, third) = (sector(&mut blk).0, sector(&mut blk).0);
    let lent = ledger(|ledger| ledger.lent.len());
    println!("{first:?}, then with an honest device {second:?}, {third:?}, still lent {lent}");
}

fn twice_asynchronous() {
    let bus = Device::new(HONEST | INDIRECT, |queue, request| {
        perform(&request);
        queue.put(request.head.into(), request.written);
        queue.put(request.head.into(), request.written);
        queue.publish(queue.used);
    });
    let mut blk = disk(&bus);
    let (mut request, mut data, mut response) =
        (BlkReq::default(), [0; SECTOR_SIZE], BlkResp::default());
    unsafe { blk.read_blocks_nb(0, &mut request, &mut data, &mut response) }.unwrap();
    for _ in 0..2 {
        let token = blk.peek_used().unwrap();
        let result = unsafe { blk.complete_read_blocks(token, &request, &mut data, &mut response) };
        println!("token {token}: {result:?}");
    }
}

fn too_long_in_owned_buffer() {
    let mut bus = Device::new(HONEST, |queue, request| {
        queue.put(request.head.into(), 65);
        queue.publish(queue.used);
    });
    let queue = VirtQueue::<Memory, 16>::new(&mut bus, 0, false, false).unwrap();
    let mut owning = OwningQueue::<Memory, 16, 64>::new(queue).unwrap();
    bus.notify(0);
    let result = owning.poll(&mut bus, |buffer| Ok(Some(buffer.len())));
    println!("{result:?}");
}

fn nothing_written() {
    let bus = Device::new(HONEST, |queue, request| {
        device::write::<u8>(request.writable.last().unwrap().0, 0);
        queue.put(request.head.into(), 0);
        queue.publish(queue.used);
    });
    let (result, data) = sector(&mut disk(&bus));
    println!("{result:?}, {}", right(&data));
}

fn unknown_status() {
    let bus = Device::new(HONEST, |queue, request| {
        device::write::<u8>(request.writable.last().unwrap().0, 0xFF);
        queue.push(&request);
    });
    println!("{:?}", sector(&mut disk(&bus)).0);
}

fn descriptors_overwritten() {
    let bus = Device::new(HONEST, |queue, request| {
        push(queue, request);
        queue.scribble();
    });
    let (result, data) = sector(&mut disk(&bus));
    let strange = ledger(|ledger| ledger.strange.len());
    println!("{result:?}, {}, returned unasked {strange}", right(&data));
}

fn indirect_table_overwritten() {
    IN_PLACE.store(true, Ordering::Relaxed);
    let bus = Device::new(HONEST | INDIRECT, |queue, request| {
        let table = request.table;
        push(queue, request);
        device::write::<u64>(table + 16, 0xDEAD_0000);
    });
    let result = sector(&mut disk(&bus)).0;
    println!(
        "{result:?}, returned unasked {:x?}",
        ledger(|ledger| ledger.strange.clone())
    );
}

fn features_not_kept() {
    let bus = Device::new(HONEST, push);
    bus.0.borrow_mut().status_clear = DeviceStatus::FEATURES_OK;
    let result = sector(&mut disk(&bus)).0;
    println!(
        "{result:?}, status read {} times",
        bus.0.borrow().status_reads.get()
    );
}

fn offered(features: u64, bit: u64) {
    let bus = Device::new(features, push);
    let result = sector(&mut disk(&bus)).0;
    let device = bus.0.borrow();
    println!(
        "{result:?}, offered {}, accepted {}",
        features & bit != 0,
        device.accepted & bit != 0
    );
}

fn legacy_registers() {
    let mut registers = Box::new([0u32; 1024]);
    registers[..3].copy_from_slice(&[0x7472_6976, 1, 2]);
    let header = NonNull::new(registers.as_mut_ptr() as *mut VirtIOHeader).unwrap();
    let transport = unsafe { MmioTransport::new(header, 4096) }.expect("refused");
    println!(
        "accepted as {:?}, legacy layout {}",
        transport.version(),
        transport.requires_legacy_layout()
    );
}

fn read_only() {
    let bus = Device::new(HONEST | READ_ONLY, push);
    let mut blk = disk(&bus);
    let result = blk.write_blocks(0, &[0; SECTOR_SIZE]);
    let writes = bus
        .0
        .borrow()
        .requests
        .iter()
        .filter(|request| request.kind == 1)
        .count();
    println!(
        "{result:?}, read-only {}, writes sent {writes}",
        blk.readonly()
    );
}

fn no_flush() {
    let bus = Device::new(HONEST & !FLUSH, push);
    let result = disk(&bus).flush();
    println!(
        "{result:?}, requests sent {}",
        bus.0.borrow().requests.len()
    );
}

fn restless() {
    let bus = Device::new(HONEST, push);
    bus.0.borrow_mut().restless = true;
    disk(&bus);
    println!("it started");
}

fn beyond_capacity() {
    let bus = Device::new(HONEST, push);
    let mut blk = disk(&bus);
    let result = blk.read_blocks(1_000_000_000, &mut [0; SECTOR_SIZE]);
    let sent = bus.0.borrow().requests[0].sector;
    println!(
        "{result:?}, capacity {}, sector {sent} sent",
        blk.capacity()
    );
}

fn small_queue() {
    let bus = Device::new(HONEST, push);
    bus.0.borrow_mut().queue_entries = 8;
    println!("{:?}", Blk::new(bus).map(|_| "started"));
}

fn reset_not_done() {
    let bus = Device::new(HONEST, push);
    bus.0.borrow_mut().status_set = DeviceStatus::DRIVER_OK;
    let result = sector(&mut disk(&bus)).0;
    println!(
        "{result:?}, status read {} times",
        bus.0.borrow().status_reads.get()
    );
}

fn needs_reset() {
    let bus = Device::new(HONEST, push);
    let mut blk = disk(&bus);
    bus.0.borrow_mut().status_set = DeviceStatus::DEVICE_NEEDS_RESET | DeviceStatus::FAILED;
    let result = sector(&mut blk).0;
    println!(
        "{result:?}, status read {} times",
        bus.0.borrow().status_reads.get()
    );
}

fn no_completion() {
    std::thread::spawn(|| {
        let result = sector(&mut disk(&Device::new(HONEST, |_, _| ()))).0;
        println!("{result:?}");
        std::process::exit(0);
    });
    std::thread::sleep(Duration::from_secs(2));
    println!("still waiting after two seconds");
}

fn kick_at_the_wrap() {
    let mut bus = Device::new(HONEST | EVENT_IDX, push);
    let mut queue = VirtQueue::<Memory, 16>::new(&mut bus, 0, false, true).unwrap();
    let header = [0u8; 16];
    let mut status = [0u8; 1];
    for _ in 0..65534u32 {
        queue
            .add_notify_wait_pop(&[&header], &mut [&mut status], &mut bus)
            .unwrap();
        let device = bus.0.borrow();
        device.queue.ask_for_kick(device.queue.taken);
    }
    // The device has seen 65534 requests and wants to hear of the next one. Two are added at once.
    let (mut first, mut second) = ([0u8; 1], [0u8; 1]);
    unsafe { queue.add(&[&header], &mut [&mut first]) }.unwrap();
    unsafe { queue.add(&[&header], &mut [&mut second]) }.unwrap();
    println!(
        "kick wanted by the device true, given {}",
        queue.should_notify()
    );
}
