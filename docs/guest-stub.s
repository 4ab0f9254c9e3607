# SPDX-License-Identifier: MIT OR Apache-2.0
#
# The resident stub of the demonstration guest: 64-bit mode, VMPL2, position-independent, no stack.
#   as --64 -o stub.o docs/guest-stub.s && objcopy -O binary -j .text stub.o stub.bin
# The bytes are STUB_CODE in src/svsm/kernel/guest_stub.py; a test assembles this file again and compares.
#
# On entry: rdi = mailbox (src/svsm/formats/guest_mailbox.py), rsi = calling area.
# Held: r15 mailbox, r14 calling area, r12 the request being served, rbx its flags.

        .intel_syntax noprefix
        .text

        .set REQUEST,        0x00
        .set DONE,           0x08
        .set FLAGS,          0x10
        .set IN_RAX,         0x18
        .set IN_RCX,         0x20
        .set IN_RDX,         0x28
        .set IN_R8,          0x30
        .set IN_R9,          0x38
        .set BUFFER,         0x40
        .set LENGTH_IN,      0x48
        .set LENGTH_OUT,     0x50
        .set OUT_RAX,        0x58
        .set OUT_RCX,        0x60
        .set OUT_RDX,        0x68
        .set OUT_R8,         0x70
        .set OUT_R9,         0x78
        .set OUT_PENDING,    0x80
        .set OUT_GHCB_MSR,   0x88
        .set TARGET_VMPL,    0x90
        .set DATA,           0x1000
        .set GHCB_MSR,       0xC0010130
        .set RUN_VMPL_REQ,   0x16

start:
        mov     r15, rdi
        mov     r14, rsi
        cld
idle:
        mov     r12, [r15 + REQUEST]
        cmp     r12, [r15 + DONE]
        jne     serve
        hlt                             # the SVSM lets us go on when there may be something to do
        jmp     idle

serve:
        mov     rbx, [r15 + FLAGS]
        test    bl, 2                   # COPY_IN
        jz      call
        lea     rsi, [r15 + DATA]
        mov     rdi, [r15 + BUFFER]
        mov     rcx, [r15 + LENGTH_IN]
        rep movsb

call:
        test    bl, 8                   # CALL
        jz      copy_out
        test    bl, 1                   # PENDING
        jz      ask
        mov     byte ptr [r14], 1
ask:
        mov     edx, [r15 + TARGET_VMPL]
        mov     eax, RUN_VMPL_REQ
        mov     ecx, GHCB_MSR
        wrmsr
        mov     rax, [r15 + IN_RAX]
        mov     rcx, [r15 + IN_RCX]
        mov     rdx, [r15 + IN_RDX]
        mov     r8,  [r15 + IN_R8]
        mov     r9,  [r15 + IN_R9]
        .byte   0xf3, 0x0f, 0x01, 0xd9  # VMGEXIT
        mov     [r15 + OUT_RAX], rax
        mov     [r15 + OUT_RCX], rcx
        mov     [r15 + OUT_RDX], rdx
        mov     [r15 + OUT_R8],  r8
        mov     [r15 + OUT_R9],  r9
        mov     ecx, GHCB_MSR
        rdmsr
        shl     rdx, 32
        or      rax, rdx
        mov     [r15 + OUT_GHCB_MSR], rax
        xor     eax, eax
        xchg    [r14], al               # take call_pending back, as Linux does
        mov     [r15 + OUT_PENDING], rax
        cmp     qword ptr [r15 + IN_RAX], 0     # core protocol, REMAP_CA
        jne     copy_out
        cmp     qword ptr [r15 + OUT_RAX], 0
        jne     copy_out
        test    rax, rax                # nobody took the call: OUT_RAX is our own input
        jnz     copy_out
        mov     r14, [r15 + IN_RCX]

copy_out:
        test    bl, 4                   # COPY_OUT
        jz      finish
        mov     rsi, [r15 + BUFFER]
        lea     rdi, [r15 + DATA]
        mov     rcx, [r15 + LENGTH_OUT]
        rep movsb

finish:
        mov     [r15 + DONE], r12
        jmp     idle
