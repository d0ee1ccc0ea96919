// A float16 times a float16 as an integer mantissa and a shift: mantissa * 2**(shift - 48), exactly, for all finite ones.
//
// A float16 is (-1)**s * m * 2**(e - 25) with m < 2**11: 1024 + fraction for exponent field e >= 1; a subnormal is its
// fraction with e = 1 (IEEE 754-2008, 3.4). `special`: one of them is an infinity or a NaN.
// Latency: 1 cycle.
module half_product (
    input  wire               clk,
    input  wire [15:0]        a,
    input  wire [15:0]        b,
    output reg  signed [22:0] mantissa,
    output reg  [5:0]         shift,      // 0..58
    output reg                special
);
    wire [10:0] ma = {|a[14:10], a[9:0]};
    wire [10:0] mb = {|b[14:10], b[9:0]};
    wire [21:0] product = ma * mb;
    wire [4:0] ea = a[14:10] - {4'd0, |a[14:10]};
    wire [4:0] eb = b[14:10] - {4'd0, |b[14:10]};
    always @(posedge clk) begin
        mantissa <= a[15] ^ b[15] ? -{1'b0, product} : {1'b0, product};
        shift    <= {1'b0, ea} + {1'b0, eb};
        special  <= &a[14:10] | &b[14:10];
    end
endmodule
